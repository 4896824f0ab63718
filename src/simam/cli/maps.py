"""What the SimAM layers of a model make of photographs, ready to be drawn.

Matplotlib and Pillow, which comes with it, load with the first call.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..attention_maps import attention_maps
from ..messages import UserError, format_shape, one_line
from ..reference import gate_bounds
from .models import Subject
from .report import Progress

LOWER_BOUND, _ = gate_bounds(1, "shared")  # of every gate
_EXTRA = 'pip install "simam[viz]"'
_BINS = 40
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass
class Layer:
    """What is drawn of one layer.

    Attributes:
        path (str): see `attention_maps`.
        upper (float): the bound that no gate of its maps exceeds.
        maps (list of Tensor[H, W]): the gate's mean over the channels, for each photograph.
        counts (Tensor[B]): neurons of all photographs by their gate, in bins of equal width from
            sigmoid(1/2) to 1.
    """

    path: str
    upper: float
    maps: list[Tensor] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))


def read(path: str) -> Any:
    """A photograph as a Pillow image in RGB, upright as its camera says.

    Raises:
        UserError: the file cannot be read, or is no image.
    """
    image, operations = load("PIL.Image"), load("PIL.ImageOps")
    try:
        with image.open(path) as file:
            return operations.exif_transpose(file).convert("RGB")
    except Exception as error:  # a broken file may break anywhere in its reader
        detail = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"cannot read {path}: {detail}; expected a .jpg, .png or other image file"
        ) from error


def look(
    subject: Subject,
    photographs: Sequence[Any],
    globs: Sequence[str] | None = None,
    *,
    statistics: str = "shared",
    progress: Progress = lambda stage, done, total: None,
) -> tuple[list[Tensor], list[Layer]]:
    """The attention maps of a model for photographs, one forward pass for each.

    Args:
        subject (Subject): the model, with SimAM.
        photographs (sequence of PIL.Image): in RGB.
        globs (sequence of str, optional): over the paths of `attention_maps`; by default the last
            layer of each resolution.
        statistics (str): those of the model's SimAM.
        progress (callable): called with a stage, the steps done of it, and their number.

    Returns:
        list of Tensor[3, H, W]: what the model saw of the photographs, from 0 to 1.
        list of Layer: the chosen layers, in the order of the forward pass.

    Raises:
        UserError: the model takes something else than single images, fails on them, or a glob
            matches none of its layers.
    """
    if subject.takes == "pair" or len(subject.input_size) != 3:
        kind = "pairs of images" if subject.takes == "pair" else "videos"
        raise UserError(f"{subject.name} takes {kind}; maps are drawn for models of single images")
    transform, mean, std = _preprocessing(subject)
    seen: list[Tensor] = []
    layers: dict[str, Layer] = {}
    for done, photograph in enumerate(photographs):
        progress("looking", done, len(photographs))
        x = transform(photograph)
        try:
            gates = attention_maps(subject.model, [x] if subject.takes == "list" else x[None])
        except Exception as error:  # the model's own code
            raise UserError(
                f"{subject.name} fails on an input of shape {format_shape(x.shape)} "
                f"({one_line(error)})"
            ) from error
        # Others do not show a photograph from edge to edge, as the windows of a detector's head.
        gates = {p: gate for p, gate in gates.items() if gate.dim() == 4 and len(gate) == 1}
        for path in _choose(gates, globs):
            gate = gates[path][0].clamp(LOWER_BOUND, 1)  # rounding would put some outside the bins
            if not gate.isfinite().all():
                raise UserError(
                    f"the gates of {path} are not finite: values of {subject.name} overflow before "
                    "it; check its weights"
                )
            _, bound = gate_bounds(gate[0].numel(), statistics)
            layer = layers.setdefault(path, Layer(path, bound))
            layer.maps.append(gate.mean(0))
            layer.counts += gate.histc(_BINS, LOWER_BOUND, 1)
        seen.append(x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    return seen, list(layers.values())


def load(module: str) -> Any:
    """A module of matplotlib or Pillow.

    Raises:
        UserError: it is missing; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.partition('.')[0]} cannot be imported ({one_line(error)}): {_EXTRA}"
        ) from error


def _preprocessing(
    subject: Subject,
) -> tuple[Callable[[Any], Tensor], Sequence[float], Sequence[float]]:
    """The model's own, and the mean and standard deviation that it normalises with."""
    if subject.library == "timm":
        data = importlib.import_module("timm.data")
        config = data.resolve_model_data_config(subject.model)
        return data.create_transform(**config), config["mean"], config["std"]
    side = subject.input_size[-1]
    for weights in importlib.import_module("torchvision.models").get_model_weights(subject.name):
        preset = weights.transforms()
        if getattr(preset, "crop_size", None) == [side]:
            return preset, preset.mean, preset.std
    transforms = importlib.import_module("torchvision.transforms")
    cut = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    if subject.takes == "list":  # a detector, which normalises by itself
        return transforms.Compose(cut), (0.0,) * 3, (1.0,) * 3
    return transforms.Compose([*cut, transforms.Normalize(_MEAN, _STD)]), _MEAN, _STD


def _choose(gates: Mapping[str, Tensor], globs: Iterable[str] | None) -> list[str]:
    if globs is None:
        return list({gate.shape[2:]: path for path, gate in gates.items()}.values())
    chosen = set()
    for glob in globs:
        matches = {path for path in gates if fnmatchcase(path, glob)}
        if not matches:
            raise UserError(f"--layers {glob!r} matches none of the layers: {', '.join(gates)}")
        chosen |= matches
    return [path for path in gates if path in chosen]
