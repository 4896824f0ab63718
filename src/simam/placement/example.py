"""What a user gives as an example of a model's input."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves

Example: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model, by position and by name.

    Raises:
        TypeError: the example is neither a tensor, nor a tuple, nor a mapping.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise TypeError(
        "example must be a tensor, a tuple of arguments, or a dict of keyword arguments, "
        f"got {type(example).__name__}"
    )


def holds_values(example: Example) -> bool:
    """Whether a model that reads values in Python can run on the example: no tensor is on meta."""
    return not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(arguments(example)))
