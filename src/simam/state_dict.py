"""State dicts from files, without running code from them, and how they fit a network."""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

_EXPECTED = 'a state dict (names to tensors), by itself or as "state_dict" or "model" of a dict'
_FORMATS = "expected one written by torch.save(model.state_dict(), ...) or a .safetensors file"


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, without running code from it.

    Args:
        path (str or PathLike): a file of `torch.save` or a `.safetensors` file: a state dict, or
            a dict that holds one as "state_dict" or "model". A prefix `module.` of all names is
            dropped.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, could run code, or holds no state dict.
        ImportError: a `.safetensors` file without safetensors installed.
    """
    state = unwrap(_read(path))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected {_EXPECTED}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds {key!r} with a {type(value).__name__}, expected {_EXPECTED}"
            )
    return state


def unwrap(content: Any) -> Any:
    """The state dict in a checkpoint, without the prefix of DataParallel; else what was given."""
    if isinstance(content, dict):
        inner = (content[key] for key in ("state_dict", "model") if key in content)
        content = next((state for state in inner if isinstance(state, dict)), content)
        if all(isinstance(key, str) and key.startswith("module.") for key in content):
            content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """How tensors differ in name and shape from those of a network; empty if they do not."""
    wrong = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} (expected {_by(own[key])}, got {_by(state[key])})"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    return "; ".join(f"{len(keys)} {what}: {some(keys)}" for what, keys in wrong.items() if keys)


def some(names: Sequence[str]) -> str:
    """The first of several names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(path: str | os.PathLike[str]) -> Any:
    is_safetensors = os.fspath(path).endswith(".safetensors")
    if is_safetensors:
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise ImportError(f'cannot read {path} ({error}): pip install "simam[timm]"') from error
    with open(path, "rb") as file:
        try:
            if is_safetensors:
                return load(file.read())
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what is no file of weights may break anywhere in the reader
            raise ValueError(f"{path} is refused: {_problem(error)}; {_FORMATS}") from error


def _problem(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"it asks for {wanted[1]}. A file that holds more than tensors could run code"
    text = textwrap.shorten(str(error), 160)
    if isinstance(error, UnpicklingError):  # whose message is a page about weights_only
        text = "a pickle of a form that is not read safely"
    summary = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{summary}. It is cut short, damaged, or no file of weights"


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
