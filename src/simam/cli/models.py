"""Build torchvision and timm models by name, load weights from a file, and make inputs.

Nothing is downloaded: models are built with random weights.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import nn

from ..messages import UserError, install_hint, one_line
from ..state_dict import load_strictly
from ..weights_file import read

_FRAMES = 16  # of a video clip; the minimum that every torchvision video model accepts


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors about arguments of the library into user errors about options.

    In the message, the argument where= becomes the option --where.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(
            re.sub(r"\b(place|where|exclude)=(,?) ?", r"--\1\2 ", str(error))
        ) from error


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, its origin, and the form of its inputs.

    Attributes:
        name (str): the model's name in its library.
        library (str): "torchvision" or "timm".
        version (str): the library's version.
        model (nn.Module): the model, on the CPU.
        input_size (tuple of int): shape of one sample, `(C, *spatial)`.
        takes (str): "batch", one tensor; "list", a list of images, as detection models do;
            "pair", two tensors, as optical flow does.
        weights (str or None): the file of the weights; None if they are random.
    """

    name: str
    library: str
    version: str
    model: nn.Module
    input_size: tuple[int, ...]
    takes: str = "batch"
    weights: str | None = None

    def shape(self, batch: int, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """The shape of a batch of samples of this size; one number is height and width.

        Raises:
            UserError: the size does not have as many dimensions as the model's input.
        """
        shape = self.input_size if size is None else tuple(size)
        if len(shape) == 1:
            shape = (*self.input_size[:-2], *shape, *shape)
        if len(shape) != len(self.input_size):
            raise UserError(
                f"the input size of {self.name} must be 1 or {len(self.input_size)} numbers, "
                f"such as {spaced(self.input_size)}, got {spaced(shape)}"
            )
        return (batch, *shape)

    def inputs(self, shape: Sequence[int]) -> tuple[Any, ...]:
        """Arguments for the model's forward, random between 0 and 1, the same at every call."""
        samples = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
        if self.takes == "list":
            return (list(samples),)
        return (samples, samples.flip(-1)) if self.takes == "pair" else (samples,)


def build(
    name: str, weights: str | None = None, *, seed: int = 0, num_classes: int | None = None
) -> Subject:
    """Build a model by name, with weights from a file or random weights.

    Args:
        name (str): `torchvision/NAME`, `timm/NAME`, or a bare NAME, which is looked up in
            torchvision first, then in timm. A timm name may have a tag, which selects the input
            size.
        weights (str, optional): see `load_weights`.
        seed (int): seed of the random weights, which are the same at every call.
        num_classes (int, optional): outputs of the classifier; by default as in the library.

    Raises:
        UserError: the name is unknown, its library is missing, or `load_weights` refuses the file.
    """
    prefix, _, rest = name.partition("/")
    libraries, name = ([prefix], rest) if prefix in _LIBRARIES else (list(_LIBRARIES), name)
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    close, missing = [], []
    for library in libraries:
        list_names, make = _LIBRARIES[library]
        try:
            package = import_optional(library, "timm")
        except UserError as error:
            missing.append(str(error))
            continue
        names = list_names(package)
        if name in names:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                subject = make(package, name, arguments)
            if weights is not None:
                load_weights(subject.model, weights)
            return replace(subject, weights=weights)
        matches = get_close_matches(name.lower(), [n for n in names if "." not in n], n=5)
        close.append(f"{', '.join(matches) or 'none'} ({library})")
    unknown = [f"unknown model {name!r}; close names: {'; '.join(close)}"] if close else []
    raise UserError(". ".join(unknown + missing))


def load_weights(model: nn.Module, path: str) -> None:
    """Load a state dict from a file, strictly, without running code from it.

    Args:
        model (nn.Module): changed in place.
        path (str): a file of `torch.save` or a `.safetensors` file: a state dict, or a dict that
            holds one as "state_dict" or "model". A prefix `module.` of all names is dropped.

    Raises:
        UserError: the file cannot be read, holds something else, or does not fit the model.

    Warns:
        UserWarning: the file records other SimAM layers than the model has.
    """
    try:
        state = read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        load_strictly(model, state, path)
    except ValueError as error:
        raise UserError(f"{error}. Name the model that they were saved from") from error


def spaced(shape: Iterable[int]) -> str:
    """Write a shape as on the command line: 3 224 224."""
    return " ".join(map(str, shape))


def import_optional(module: str, extra: str) -> Any:
    """Import a module that an extra installs.

    Raises:
        UserError: the module cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        package = module.partition(".")[0]
        raise UserError(
            f"{package} cannot be imported ({one_line(error)}); {install_hint(extra)}"
        ) from error


def _from_torchvision(torchvision: Any, name: str, arguments: dict[str, int]) -> Subject:
    models = torchvision.models
    builder = models.get_model_builder(name)
    takes_backbone = "weights_backbone" in inspect.signature(builder).parameters
    backbone = {"weights_backbone": None} if takes_backbone else {}
    model = builder(weights=None, **backbone, **arguments)
    transforms = [weights.transforms for weights in models.get_model_weights(name)]
    crops = [getattr(transform, "keywords", {}).get("crop_size", 224) for transform in transforms]
    # Published weights differ in crop size; the architecture is designed for the smallest.
    crop = min(max(crop) if isinstance(crop, tuple) else crop for crop in crops)
    input_size: tuple[int, ...] = (3, crop, crop)
    takes = "batch"
    match builder.__module__.removeprefix("torchvision.models.").partition(".")[0]:
        case "video":
            input_size = (3, _FRAMES, crop, crop)
        case "detection":  # the model resizes its images to this size
            side = model.transform.min_size[-1]
            input_size, takes = (3, side, side), "list"
        case "optical_flow":
            input_size, takes = (3, 128, 128), "pair"  # the minimum for RAFT
    return Subject(name, "torchvision", torchvision.__version__, model.eval(), input_size, takes)


def _from_timm(timm: Any, name: str, arguments: dict[str, int]) -> Subject:
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    return Subject(name, "timm", timm.__version__, model, tuple(model.pretrained_cfg["input_size"]))


def _torchvision_names(torchvision: Any) -> list[str]:
    return list(torchvision.models.list_models())


def _timm_names(timm: Any) -> list[str]:
    return [*timm.list_models(), *timm.list_pretrained()]  # without and with tags


_Make: TypeAlias = Callable[[Any, str, dict[str, int]], Subject]

_LIBRARIES: dict[str, tuple[Callable[[Any], list[str]], _Make]] = {
    "torchvision": (_torchvision_names, _from_torchvision),
    "timm": (_timm_names, _from_timm),
}
