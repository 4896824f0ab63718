"""State dicts: comparison, and strict loading that changes nothing if it fails."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .messages import first_few, format_shape, one_line

_PREFIX = "module."  # what DataParallel puts before every name
_COUNT = "num_batches_tracked"
_PROFILE = {"total_ops", "total_params"}  # buffers that thop leaves in every module

# What SimAM writes into its entry of the version metadata, which torch keeps beside a state dict.
OPTIONS = ("e_lambda", "statistics")


def unwrap(content: Any) -> Any:
    """Return the state dict of a checkpoint, without the prefix that DataParallel adds.

    Content without a state dict is returned as it is. The content is never changed.
    """
    if not isinstance(content, dict):
        return content
    inner = (content[key] for key in ("state_dict", "model") if key in content)
    state = next((value for value in inner if isinstance(value, dict)), content)
    names = [key for key in state if key not in _PROFILE]  # thop leaves some in DataParallel, too
    if names and all(isinstance(key, str) and key.startswith(_PREFIX) for key in names):
        state = _with_metadata_of(state, state)
        consume_prefix_in_state_dict_if_present(state, _PREFIX)
    return state


def compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from a network's own, in names and shapes.

    The batch counts of norms are not compared: files of torch before 0.4.1 have none, and frozen
    norms keep none. `without_profile` says what else may be left over.

    Args:
        state (dict of str to Tensor): what a file holds.
        own (dict of str to Tensor): the network's state dict.

    Returns:
        str: the first names of each kind of difference; empty if the two fit.
    """
    missing = [key for key in own if key not in state]
    unexpected = [key for key in without_profile(state, own) if key not in own]
    return _describe(missing, unexpected, _misshaped(state, own))


def without_profile(state: Mapping[str, Tensor], own: Collection[str]) -> OrderedDict[str, Tensor]:
    """Copy a state dict without the buffers that thop's `profile` leaves in every module.

    Args:
        state (dict of str to Tensor): what a file holds.
        own (collection of str): the names in the network; what it has itself is kept.

    Returns:
        OrderedDict of str to Tensor: the rest, with the version metadata.
    """
    kept = {k: t for k, t in state.items() if k in own or k.rpartition(".")[2] not in _PROFILE}
    return _with_metadata_of(state, kept)


def recorded_layers(
    state: Mapping[str, Tensor], known: Collection[str] = ()
) -> dict[str, dict[str, Any]] | None:
    """Return the SimAM layers that the version metadata of a state dict shows.

    `SimAM` writes its options there. `torch.save` keeps the metadata, safetensors does not.

    Args:
        state (dict of str to Tensor): the state dict.
        known (collection of str): paths of modules that are SimAM layers even if the metadata has
            no options for them.

    Returns:
        dict of str to dict, or None: options by the path of the layer; without options if the
            layer is of an older version, or of another library and named simam. None if there is
            no metadata, or if tensors were renamed since it was written.
    """
    metadata = _metadata(state)
    if metadata is None or not {key.rpartition(".")[0] for key in state} <= metadata.keys():
        return None
    return {
        path: {option: entry[option] for option in OPTIONS if option in entry}
        for path, entry in metadata.items()
        if isinstance(entry.get("e_lambda"), float)
        or path in known
        or path.rpartition(".")[2].lower() == "simam"
    }


def format_options(options: Mapping[str, Any]) -> str:
    """Write the options of a SimAM layer as e_lambda=0.1, statistics='shared'."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that fits a model; refuse any other and leave the model unchanged.

    What fits is decided by the model's own modules, which may accept the names of older versions.
    Batch counts of norms may be missing, and stay as they are, or be left over. `without_profile`
    says what else may be left over.

    Args:
        model (nn.Module): changed in place. If the state dict is refused, each parameter and
            buffer has the bytes it had before, and each module its mode and attributes.
        state (dict of str to Tensor): what to load; it is not changed.
        source (str): what messages call the file.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, or a module refuses its part.

    Warns:
        UserWarning: the version metadata shows SimAM at other places or with other options than
            the model has.
    """
    own = model.state_dict()
    state = without_profile(state, own)
    misshaped = _misshaped(state, own)
    fitting = _with_metadata_of(state, {k: t for k, t in state.items() if k not in misshaped})
    metadata = _metadata(fitting)
    if metadata is not None:  # `SimAM` would warn of other options, too
        fitting._metadata = _without_options(metadata)  # type: ignore[attr-defined]
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
        differences = _differing_layers(state, own)
        if differences:
            warnings.warn(
                f"the weights in {source} were saved from a network with other SimAM layers, so "
                f"outputs may differ from those in its training: {differences}",
                stacklevel=3,
            )


def _differing_layers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    ours = recorded_layers(own) or {}
    theirs = recorded_layers(state, known=ours)
    if theirs is None:
        return ""
    changed = [
        f"{path} ({format_options(theirs[path])} in the file, {format_options(ours[path])} here)"
        for path in ours
        if theirs.get(path) and theirs[path] != ours[path]
    ]
    differences = {
        "only in the file": [path for path in theirs if path not in ours],
        "only in this model": [path for path in ours if path not in theirs],
        "with other options": changed,
    }
    return _list_by_kind(differences)


def _misshaped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors whose shapes differ, each with both shapes."""
    shapes = {
        key: (tensor.shape, state[key].shape)
        for key, tensor in own.items()
        if key in state and isinstance(tensor, Tensor)  # a module's extra state need not be one
    }
    return {
        key: f"{key} (expected {format_shape(expected)}, got {format_shape(got)})"
        for key, (expected, got) in shapes.items()
        if expected != got
    }


def _describe(missing: list[str], unexpected: list[str], misshaped: dict[str, str]) -> str:
    differences = {
        "missing": [key for key in missing if not _is_count(key)],
        "unexpected": [key for key in unexpected if not _is_count(key)],
        "of another shape": list(misshaped.values()),
    }
    return _list_by_kind(differences)


def _list_by_kind(differences: Mapping[str, list[str]]) -> str:
    """Count the names of each kind of difference, and list the first."""
    return "; ".join(
        f"{len(names)} {what}: {first_few(names)}" for what, names in differences.items() if names
    )


def _is_count(key: str) -> bool:
    return key.rpartition(".")[2] == _COUNT


def _without_options(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        path: {name: value for name, value in entry.items() if name not in OPTIONS}
        for path, entry in metadata.items()
    }


def _with_metadata_of(source: Any, state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Copy a state dict, and give the copy the version metadata that torch attached to another."""
    copied = OrderedDict(state)
    metadata = _metadata(source)
    if metadata is not None:
        copied._metadata = copy.copy(metadata)  # type: ignore[attr-defined]
    return copied


def _metadata(state: Any) -> dict[str, dict[str, Any]] | None:
    """Return the version metadata of a state dict; a file may hold none, or anything."""
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict) and all(isinstance(each, dict) for each in metadata.values()):
        return metadata
    return None


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the tensors and attributes of all modules if the body raises."""
    attributes = [vars(module) for module in model.modules()]
    # Parameters, buffers, submodules and hooks are dicts among the attributes.
    dicts = [value for each in attributes for value in each.values() if isinstance(value, dict)]
    contents = [(each, each.copy()) for each in (*attributes, *dicts)]
    tensors = []
    storages = {}  # by address, since tensors may share one
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout != torch.strided:  # sparse tensors have no storage of their own
            tensors.append((tensor, tensor.detach().clone()))
            continue
        tensors.append((tensor, tensor.detach()))
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = (storage, copy.copy(storage))
    try:
        yield
    except BaseException:
        for each, before in contents:
            each.clear()
            each.update(before)
        with torch.inference_mode():  # so that tensors made in inference mode can be set, too
            for tensor, data in tensors:
                tensor.data = data
        for storage, content in storages.values():
            storage.copy_(content)  # bit for bit, whatever the tensor's dtype and strides
        raise
