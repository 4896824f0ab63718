"""State dicts: read from files without running code from them, and loaded strictly or not at all."""

import copy
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .messages import first_few, format_shape, install_hint, one_line

_EXPECTED = 'a state dict (names to tensors), by itself or as "state_dict" or "model" of a dict'
_FORMATS = "expected one written by torch.save(model.state_dict(), ...) or a .safetensors file"
_PREFIX = "module."  # what DataParallel puts before every name
_COUNT = "num_batches_tracked"


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a file, without running code from the file.

    Args:
        path (str or PathLike): a file written by `torch.save`, or a `.safetensors` file. It holds
            a state dict, or a dict with a state dict as "state_dict" or "model". The prefix
            `module.` is dropped if every name has it.

    Returns:
        dict of str to Tensor: on the CPU, with torch's version metadata if the file has it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, could run code, or holds no state dict.
        ImportError: the file is a `.safetensors` file, and safetensors is not installed.
    """
    state = unwrap(_read_content(path))
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected {_EXPECTED}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds {key!r} with a {type(value).__name__}, expected {_EXPECTED}"
            )
    return state


def unwrap(content: Any) -> Any:
    """Return the state dict of a checkpoint, without the prefix that DataParallel adds.

    Content without a state dict is returned as it is. The content is never changed.
    """
    if not isinstance(content, dict):
        return content
    inner = (content[key] for key in ("state_dict", "model") if key in content)
    state = next((value for value in inner if isinstance(value, dict)), content)
    if state and all(isinstance(key, str) and key.startswith(_PREFIX) for key in state):
        state = _with_metadata_of(state, state)
        consume_prefix_in_state_dict_if_present(state, _PREFIX)
    return state


def compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from a network's own, in names and shapes.

    The batch counts of norms are not compared: files of torch before 0.4.1 have none, and frozen
    norms keep none.

    Args:
        state (dict of str to Tensor): what a file holds.
        own (dict of str to Tensor): the network's state dict.

    Returns:
        str: the first names of each kind of difference; empty if the two fit.
    """
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    return _describe(missing, unexpected, _misshaped(state, own))


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that fits a model; refuse any other and leave the model unchanged.

    What fits is decided by the model's own modules, which may accept the names of older versions.
    Batch counts of norms may be missing, and stay as they are, or be left over.

    Args:
        model (nn.Module): changed in place. If the state dict is refused, each parameter and
            buffer has the bytes it had before, and each module its mode and attributes.
        state (dict of str to Tensor): what to load; it is not changed.
        source (str): what the error message calls the file.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, or a module refuses its part.
    """
    own = model.state_dict()
    misshaped = _misshaped(state, own)
    fitting = _with_metadata_of(state, {k: t for k, t in state.items() if k not in misshaped})
    with _unchanged_on_error(model):
        try:
            missing, unexpected = model.load_state_dict(fitting, strict=False)
        except Exception as error:  # the loaders of modules may raise anything
            wrong = one_line(error)
        else:
            missing = [key for key in missing if key not in misshaped]
            wrong = _describe(missing, unexpected, misshaped)
        if wrong:
            raise ValueError(
                f"the weights in {source} are not those of this model, which has {len(own)} "
                f"tensors; {wrong}"
            )


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
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the readers raise anything on a file of another format
            raise ValueError(f"{path} is refused: {_problem(error)}; {_FORMATS}") from error


def _problem(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"it asks for {wanted[1]}. A file that holds more than tensors could run code"
    if isinstance(error, UnpicklingError):  # its own message is a page about weights_only
        error = UnpicklingError("a pickle of a form that is not read safely")
    return f"{one_line(error)}. The file is truncated, damaged, or holds no weights"


def _misshaped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors whose shapes differ, each with both shapes."""
    return {
        key: f"{key} (expected {format_shape(own[key].shape)}, got {format_shape(state[key].shape)})"
        for key in own
        # A module's extra state need not be a tensor.
        if key in state and isinstance(own[key], Tensor) and state[key].shape != own[key].shape
    }


def _describe(missing: list[str], unexpected: list[str], misshaped: dict[str, str]) -> str:
    differences = {
        "missing": [key for key in missing if not _is_count(key)],
        "unexpected": [key for key in unexpected if not _is_count(key)],
        "of another shape": list(misshaped.values()),
    }
    return "; ".join(
        f"{len(names)} {what}: {first_few(names)}" for what, names in differences.items() if names
    )


def _is_count(key: str) -> bool:
    return key.rpartition(".")[2] == _COUNT


def _with_metadata_of(
    source: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> OrderedDict[str, Tensor]:
    """Copy a state dict, with the version metadata that torch attached to the source."""
    copied: Any = OrderedDict(state)
    if hasattr(source, "_metadata"):
        copied._metadata = copy.copy(source._metadata)
    return copied


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the tensors and attributes of all modules if the body raises."""
    tables = ("_parameters", "_buffers", "_modules")
    attributes = [
        (module, {k: copy.copy(v) if k in tables else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    values = [
        (tensor, tensor.detach().clone())
        for tensor in (*model.parameters(), *model.buffers())
        if not tensor.is_meta
    ]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(_bytes(tensor), _bytes(value)):  # some tensors cannot be written
                    tensor.copy_(value)
        raise


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
