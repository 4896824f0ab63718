"""Collect the gates of a model's SimAM layers for images, ready to be drawn.

Pillow, which comes with matplotlib, is imported when the first image is read.
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
from .models import Subject, import_optional
from .progress import Progress

_BINS = 40
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Layer:
    """The gates of one SimAM layer for all images, ready to be drawn.

    Attributes:
        path (str): see `attention_maps`.
        bounds (tuple of float): the smallest and the largest gate that is possible in its maps.
        maps (list of Tensor[H, W]): the gate averaged over the channels, for each image.
        counts (Tensor[B]): histogram of the gates of all neurons in all images, in bins of equal
            width from the lower bound to 1.
    """

    path: str
    bounds: tuple[float, float]
    maps: list[Tensor] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))


def read_image(path: str) -> Any:
    """Read an image file as a Pillow image in RGB, rotated as its camera recorded.

    Raises:
        UserError: the file cannot be read, or is not an image.
    """
    image, operations = import_optional("PIL.Image", "viz"), import_optional("PIL.ImageOps", "viz")
    try:
        with image.open(path) as file:
            return operations.exif_transpose(file).convert("RGB")
    except Exception as error:  # readers of damaged files raise errors of many types
        detail = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"cannot read {path}: {detail}; expected a .jpg, .png or other image file"
        ) from error


def collect(
    subject: Subject,
    images: Sequence[Any],
    globs: Sequence[str] | None = None,
    *,
    statistics: str = "shared",
    progress: Progress = lambda stage, done, total: None,
) -> tuple[list[Tensor], list[Layer]]:
    """Compute the attention maps of a model for images, in one forward pass for each image.

    Args:
        subject (Subject): the model, with SimAM.
        images (sequence of PIL.Image): in RGB.
        globs (sequence of str, optional): over the paths of `attention_maps`; by default the last
            layer of each resolution.
        statistics (str): the statistics of the model's SimAM layers.
        progress (callable): called with a stage, its finished steps, and the number of its steps.

    Returns:
        list of Tensor[3, H, W]: the images as the model gets them, from 0 to 1.
        list of Layer: the chosen layers, in the order of the forward pass.

    Raises:
        UserError: the model does not take single images, fails on them, or a glob matches none of
            its SimAM layers.
    """
    if subject.takes == "pair" or len(subject.input_size) != 3:
        kind = "pairs of images" if subject.takes == "pair" else "videos"
        raise UserError(f"{subject.name} takes {kind}; expected a model that takes single images")
    transform, mean, std = _preprocessing(subject)
    inputs: list[Tensor] = []
    layers: dict[str, Layer] = {}
    for done, image in enumerate(images):
        progress("computing maps", done, len(images))
        x = transform(image)
        try:
            gates = attention_maps(subject.model, [x] if subject.takes == "list" else x[None])
        except Exception as error:  # the model's own code
            raise UserError(
                f"{subject.name} fails on an input of shape {format_shape(x.shape)} "
                f"({one_line(error)})"
            ) from error
        # Other gates do not cover one whole image: the head of a detector gets regions of it.
        gates = {p: gate for p, gate in gates.items() if gate.dim() == 4 and len(gate) == 1}
        for path in _choose(gates, globs):
            bounds = gate_bounds(gates[path][0, 0].numel(), statistics)
            gate = gates[path][0].clamp(bounds[0], 1)  # rounding may exceed the range of the bins
            if not gate.isfinite().all():
                raise UserError(
                    f"the gates of {path} are not finite: activations of {subject.name} overflow "
                    "before this layer; check the weights"
                )
            layer = layers.setdefault(path, Layer(path, bounds))
            layer.maps.append(gate.mean(0))
            layer.counts += gate.histc(_BINS, bounds[0], 1)
        inputs.append(x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    return inputs, list(layers.values())


def _preprocessing(
    subject: Subject,
) -> tuple[Callable[[Any], Tensor], Sequence[float], Sequence[float]]:
    """The transform of the model's images, and the mean and deviation it normalises with."""
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
    crop = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
    if subject.takes == "list":  # detectors normalise images themselves
        return transforms.Compose(crop), (0.0,) * 3, (1.0,) * 3
    normalize = transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)
    return transforms.Compose([*crop, normalize]), _IMAGENET_MEAN, _IMAGENET_STD


def _choose(gates: Mapping[str, Tensor], globs: Iterable[str] | None) -> list[str]:
    if globs is None:
        return list({gate.shape[2:]: path for path, gate in gates.items()}.values())
    chosen = set()
    for glob in globs:
        matches = {path for path in gates if fnmatchcase(path, glob)}
        if not matches:
            raise UserError(
                f"--layers {glob!r} matches none of the SimAM layers: {', '.join(gates)}"
            )
        chosen |= matches
    return [path for path in gates if path in chosen]
