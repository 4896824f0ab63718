"""Somebody's module under examination: a copy of it, run on inputs of ours."""

import contextlib
import copy
import io
import itertools
import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import format_shape, one_line

# Sizes to try where a module takes no map of 5 x 7 with 8 channels.
_CHANNELS = (8, 64, 3)
_MAPS = ((5, 7), (6, 6), (7, 7), (16, 16))
_MAX_NUMBERS = 8


class ProbeError(Exception):
    """The module raised an error for an input; the message is the error in one line."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run foreign code without gradients, prints, warnings, or a trace in random generators."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpy_state)


class Subject:
    """A copy of a module on the CPU, in evaluation mode, without hooks.

    Attributes:
        copy (nn.Module): what runs.
        shape (tuple of int): the shape of input that the module takes, with several channels and
            positions.
        dtype (torch.dtype): float64, or float32 where the module takes no float64.
        returns_tuple (bool), overwrites (bool): the module has returned a tuple or a list, of which
            the first tensor counts; it has changed its input.

    Raises:
        ValueError: the module cannot be copied, or takes no input that was tried.
    """

    def __init__(self, module: nn.Module) -> None:
        try:
            self.copy = copy.deepcopy(module, _copies_of_results(module))
            _remove_hooks(self.copy)
            self.copy.to("cpu").eval()
        except Exception as error:  # the module's own code
            raise ValueError(
                f"this {type(module).__name__} cannot be copied: {one_line(error)}"
            ) from error
        self.returns_tuple = self.overwrites = False
        self.dtype = torch.float64
        self.shape = self._find_shape(type(module).__name__)

    def __call__(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        """Run the module, or another copy of it, on a copy of x (Tensor[...]).

        Raises:
            ProbeError: the module fails, or returns no floating-point tensor.
        """
        given = x.clone()
        try:
            output: Any = (module or self.copy)(given)
        except Exception as error:  # the module's own code
            raise ProbeError(one_line(error)) from error
        self.overwrites |= not torch.equal(given.detach(), x.detach())
        if isinstance(output, (tuple, list)):
            self.returns_tuple = True
            output = next((each for each in output if isinstance(each, Tensor)), None)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise ProbeError(f"it returns {kind}, not a floating-point tensor")
        return output

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether the module takes an input of this shape, and does not broadcast it."""
        x = torch.linspace(-1, 1, math.prod(shape), dtype=self.dtype).reshape(*shape)
        try:
            output = self(x)
        except ProbeError:
            return False
        return output.dim() != x.dim() or all(
            o <= s for o, s in zip(output.shape, shape, strict=True)
        )

    def _find_shape(self, name: str) -> tuple[int, ...]:
        numbers = _numbers_of(self.copy)
        channels = dict.fromkeys([_CHANNELS[0], *numbers, *_CHANNELS])
        sides = [n for n in numbers if n <= 64]
        pairs = [*((n, n) for n in sides), *itertools.pairwise(sides)]
        maps = dict.fromkeys([_MAPS[0], *pairs, *_MAPS])
        flat = [(2, c, *m) for m in maps for c in channels]
        lines = [
            (2, *each)
            for c in channels
            for length in (35, 36)
            for each in ((c, length), (length, c))
        ]
        volumes = [(2, c, 3, 4, 5) for c in channels]
        shapes = [*flat, *((2, *_MAPS[0], c) for c in numbers), *lines, *volumes]
        for dtype in (torch.float64, torch.float32):
            self.dtype = dtype
            self.copy.to(dtype)
            for shape in shapes:
                if self.takes(shape):
                    return shape
        shape = flat[0]
        try:
            self(torch.ones(shape, dtype=self.dtype))
            reason = "it takes no values other than 1"
        except ProbeError as error:
            reason = str(error)
        raise ValueError(
            f"this {name} takes no map of the kind (N, C, H, W): on an input of shape "
            f"{format_shape(shape)} it fails ({reason}). It must take one floating-point tensor"
        )


def _copies_of_results(module: nn.Module) -> dict[int, Any]:
    """Copies of the tensors with a gradient history that a module holds; deepcopy refuses them."""
    memo: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif isinstance(value, dict):
            visit(list(value.values()))

    for part in module.modules():
        visit({k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")})
    return memo


def _remove_hooks(module: nn.Module) -> None:
    """Hooks of a copy would reach into whatever the hooks of the original belong to."""
    for part in module.modules():
        for hooks in hooks_of(part):
            hooks.clear()


def hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    """The tables of hooks that a module has registered."""
    return [
        v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict) and v
    ]


def _numbers_of(module: nn.Module) -> list[int]:
    """Numbers that may be sizes of its input: integer attributes and sizes of parameters."""
    numbers: dict[int, None] = {}
    for part in module.modules():
        for value in vars(part).values():
            each = value if isinstance(value, (tuple, list)) else [value]
            numbers |= dict.fromkeys(v for v in each if type(v) is int)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            numbers |= dict.fromkeys(tensor.shape)
    return [n for n in numbers if 1 < n <= 1024][:_MAX_NUMBERS]
