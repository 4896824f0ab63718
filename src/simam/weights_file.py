"""State dicts in files: reading without running code from the file."""

import os
import re
import zipfile
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .messages import install_hint, one_line
from .state_dict import unwrap

_EXPECTED = 'a state dict (names to tensors), by itself or as "state_dict" or "model" of a dict'
_FORMATS = "expected one written by torch.save(model.state_dict(), ...) or a .safetensors file"


class _Unread:
    """Takes the place of a value beside the weights, whatever its arguments and its state."""

    kind: str  # for messages

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# By the full names that files use. Only the names are those of numpy and argparse: the values are
# not needed, so nothing of the two runs, and numpy need not be installed.
_UNREAD: list[Any] = [
    type(name, (_Unread,), {"__module__": module, "__qualname__": name, "kind": kind})
    for module, name, kind in (
        ("argparse", "Namespace", "Namespace"),
        ("numpy", "dtype", "numpy dtype"),
        ("numpy", "ndarray", "numpy array"),
        ("numpy.core.multiarray", "scalar", "numpy number"),  # numpy 1
        ("numpy.core.multiarray", "_reconstruct", "numpy array"),
        ("numpy._core.multiarray", "scalar", "numpy number"),  # numpy 2
        ("numpy._core.multiarray", "_reconstruct", "numpy array"),
    )
]


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, without running code from the file.

    Numbers and arrays of numpy and an `argparse.Namespace` may stand beside the state dict; they
    are skipped.

    Args:
        path (str or PathLike): a file written by `torch.save`, or a `.safetensors` file. It holds
            a state dict, or a dict with a state dict as "state_dict" or "model". The prefix
            `module.` is dropped if every name has it.

    Returns:
        dict of str to Tensor: on the CPU, with torch's version metadata if the file has it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, could run code, or holds no state dict. If it holds other
            objects, the message says how to save the weights alone.
        ImportError: the file is a `.safetensors` file, and safetensors is not installed.
    """
    state = unwrap(_read_content(path))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected {_EXPECTED}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = value.kind if isinstance(value, _Unread) else type(value).__name__
            raise ValueError(f"{path} holds {key!r} with a {kind}, expected {_EXPECTED}")
    return state


def _read_content(path: str | os.PathLike[str]) -> Any:
    is_safetensors = os.fspath(path).endswith(".safetensors")
    if is_safetensors:
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise ImportError(f"cannot read {path} ({error}): {install_hint('timm')}") from error
    with open(path, "rb") as file:
        try:
            if is_safetensors:
                return load(file.read())
            with torch.serialization.safe_globals(_UNREAD):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the readers raise anything on a file of another format
            raise ValueError(f"{path} is refused: {_problem(error, path)}") from error


def _problem(error: Exception, path: str | os.PathLike[str]) -> str:
    text = str(error)
    wanted = re.search(r"GLOBAL (\S+)", text)
    if wanted:
        problem = f"it asks for {wanted[1]}. A file that holds more than tensors could run code"
        is_blocked = "is blocked" in text  # a module such as os, which no weights need
        return f"{problem}; {_FORMATS if is_blocked else _resaving(path)}"
    if "Unsupported operand" in text and zipfile.is_zipfile(path):  # a whole file of torch
        problem = "its pickle protocol is not the default of torch.save, and is not read safely"
        return f"{problem}; {_resaving(path)}"
    if isinstance(error, UnpicklingError):  # its own message is a page about weights_only
        error = UnpicklingError("a pickle of a form that is not read safely")
    return f"{one_line(error)}. The file is truncated, damaged, or holds no weights; {_FORMATS}"


def _resaving(path: str | os.PathLike[str]) -> str:
    """Give the command that saves the weights of a file alone, whatever else the file holds."""
    source = os.fspath(path)
    target = f"{os.path.splitext(source)[0]}-weights.pt"
    return (
        "if you trust the file, save its weights alone, where its libraries are installed: "
        f"python -c \"import torch; f = torch.load({source!r}, map_location='cpu', "
        "weights_only=False); "
        "f = f.get('state_dict', f.get('model', f)) if isinstance(f, dict) else f; "
        f'torch.save(f.state_dict() if isinstance(f, torch.nn.Module) else f, {target!r})"'
    )
