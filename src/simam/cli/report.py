"""Measure a model without and with SimAM: insertions, parameters, multiply-adds and time."""

import copy
import glob
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__
from ..attach import attach
from ..messages import UserError, format_shape, one_line
from ..placement import Insertion, Plan, plan
from .models import Subject, spaced, user_errors
from .progress import Progress

_SECONDS = 8.0  # of timing, unless --repeats is given
_MIN_PAIRS, _MAX_PAIRS = 3, 100


@dataclass(frozen=True)
class MeasuredInsertion:
    """One SimAM layer: the module whose output it gets, and that output in a forward pass.

    Attributes:
        path (str): path of the host, the module whose output passes through SimAM.
        block (str): path of the residual block; "" for the model itself.
        host (str): kind of the host, such as "Conv2d 3x3".
        reason (str): why SimAM goes there.
        shape (list of int or None): shape `(N, C, *spatial)` of the host's output at its first
            call; None if the host is not called.
        calls (int): number of calls.
        elements (int): number of values that SimAM scales, summed over all calls.
    """

    path: str
    block: str
    host: str
    reason: str
    shape: list[int] | None
    calls: int
    elements: int


@dataclass(frozen=True)
class Report:
    """A model before and after SimAM; the attributes are the keys of `simam report --json`.

    Attributes:
        model (str): the model's name in its library.
        library (str): "torchvision" or "timm".
        weights (str or None): the file of the weights; None if they are random.
        input_shape (list of int): `(N, C, *spatial)`.
        takes (str): how the model takes inputs of this shape: "batch", one tensor; "list", a list
            of images; "pair", two tensors.
        e_lambda (float), statistics (str), place (str): the options of `simam.attach`.
        insertions (list of MeasuredInsertion): where SimAM goes, in the model's order.
        unanalysed (list of dict): blocks that may be residual but could not be analysed and
            therefore get no SimAM: "block" and "reason".
        elements (int): number of values that all SimAM layers scale in one forward pass.
        parameters (dict of int): "before" and "after".
        multiply_adds (dict of int): "before" and "after", for one forward pass. Counted are
            convolutions and matrix products, by torch's counter, and two for every element that a
            batch norm normalises, as in the paper. Other elementwise operations, including those
            of SimAM, are not counted.
        forward_ms (dict): time of one forward pass in milliseconds: the medians "before" and
            "after", and the first and third quartiles "before_quartiles" and "after_quartiles".
        ratio (float): the time after divided by the time before, median over the pairs of passes.
        ratio_quartiles (list of float): first and third quartile of this ratio.
        repeats (int): number of pairs of passes; a pair is one pass before and one after.
        threads (int): number of threads that torch computes with.
        versions (dict of str): versions of "simam", "torch" and the library.
    """

    model: str
    library: str
    weights: str | None
    input_shape: list[int]
    takes: str
    e_lambda: float
    statistics: str
    place: str
    insertions: list[MeasuredInsertion]
    unanalysed: list[dict[str, str]]
    elements: int
    parameters: dict[str, int]
    multiply_adds: dict[str, int]
    forward_ms: dict[str, Any]
    ratio: float
    ratio_quartiles: list[float]
    repeats: int
    threads: int
    versions: dict[str, str]


def measure(
    subject: Subject,
    shape: Sequence[int],
    *,
    e_lambda: float = 1e-4,
    statistics: str = "shared",
    place: str = "conv",
    where: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    repeats: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Compare a model with a copy that has SimAM; the model itself is not changed.

    Args:
        subject (Subject): the model.
        shape (sequence of int): shape of the input, as from `subject.shape`.
        e_lambda (float): see `simam.attach`.
        statistics (str): see `simam.attach`.
        place (str): see `simam.plan`.
        where (sequence of str, optional): globs, see `simam.plan`.
        exclude (sequence of str, optional): globs, see `simam.plan`.
        repeats (int, optional): pairs of passes to time; by default as many as fit into 8
            seconds, but at least 3 and at most 100.
        progress (callable): called with a stage, its finished steps, and the number of its steps.

    Raises:
        UserError: the model has no place for SimAM, or fails on the input.
    """
    plain, inputs = subject.model, subject.inputs(shape)
    progress("planning", 0, 1)
    with user_errors():
        planned = _plan(plain, inputs, place=place, where=where, exclude=exclude)
        shapes: dict[str, list[torch.Size]] = {insertion.path: [] for insertion in planned}
        attached = attach(
            copy.deepcopy(plain),
            e_lambda=e_lambda,
            statistics=statistics,
            where=[glob.escape(path) for path in shapes],
        )

    with torch.no_grad():
        hooks = [_record(plain.get_submodule(path), calls) for path, calls in shapes.items()]
        try:
            progress("counting", 0, 2)
            before = _multiply_adds(plain, inputs)
            progress("counting", 1, 2)
            after = _multiply_adds(attached, inputs)
        except Exception as error:  # the model's own code, on a shape of the user's choice
            raise UserError(
                f"{subject.name} fails on an input of shape {format_shape(shape)} "
                f"({one_line(error)}); choose an --input-size other than {spaced(shape[1:])}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        pairs = _time_pairs(plain, attached, inputs, repeats, progress)

    insertions = [_measured(insertion, shapes[insertion.path]) for insertion in planned]
    time_before = _quartiles([b for b, _ in pairs])
    time_after = _quartiles([a for _, a in pairs])
    ratio = _quartiles([a / b for b, a in pairs])
    return Report(
        model=subject.name,
        library=subject.library,
        weights=subject.weights,
        input_shape=list(shape),
        takes=subject.takes,
        e_lambda=e_lambda,
        statistics=statistics,
        place=place,
        insertions=insertions,
        unanalysed=[{"block": u.block, "reason": u.reason} for u in planned.unanalysed],
        elements=sum(insertion.elements for insertion in insertions),
        parameters={"before": _parameters(plain), "after": _parameters(attached)},
        multiply_adds={"before": before, "after": after},
        forward_ms={
            "before": time_before[1],
            "after": time_after[1],
            "before_quartiles": time_before[::2],
            "after_quartiles": time_after[::2],
        },
        ratio=ratio[1],
        ratio_quartiles=ratio[::2],
        repeats=len(pairs),
        threads=torch.get_num_threads(),
        versions={
            "simam": __version__,
            "torch": torch.__version__,
            subject.library: subject.version,
        },
    )


def _plan(model: nn.Module, inputs: tuple[Any, ...], **selection: Any) -> Plan:
    """Plan from the code of the blocks, and with the inputs as an example where that is not enough.

    Raises:
        ValueError: neither finds a place; the error of the plan without an example.
    """
    failed: ValueError | None = None
    try:
        planned = plan(model, **selection)
        is_enough = not any(block.needs_example for block in planned.unanalysed)
    except ValueError as error:
        failed, is_enough = error, False
    if not is_enough and selection["where"] is None:
        with suppress(ValueError):
            return plan(model, **selection, example=inputs)
    if failed:
        raise failed
    return planned


def _measured(insertion: Insertion, shapes: Sequence[torch.Size]) -> MeasuredInsertion:
    return MeasuredInsertion(
        **asdict(insertion),
        shape=list(shapes[0]) if shapes else None,
        calls=len(shapes),
        elements=sum(map(math.prod, shapes)),
    )


def _record(module: nn.Module, shapes: list[torch.Size]) -> torch.utils.hooks.RemovableHandle:
    def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
        shapes.append(output.shape)

    return module.register_forward_hook(record)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    def batch_norm(shape: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 4 * math.prod(shape)  # two multiply-adds are four operations

    aten = torch.ops.aten
    # Torch decomposes the first into one of the others, if its decompositions are imported.
    kinds = (
        aten.native_batch_norm,
        aten._native_batch_norm_legit,
        aten._native_batch_norm_legit_no_training,
    )
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(kinds, batch_norm))
    with counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _time_pairs(
    plain: nn.Module,
    attached: nn.Module,
    inputs: tuple[Any, ...],
    repeats: int | None,
    progress: Progress,
) -> list[tuple[float, float]]:
    """Milliseconds before and after, interleaved, so that changes of clock speed affect both."""
    progress("warming up", 0, 1)
    expected = _time(plain, inputs) + _time(attached, inputs)
    fitting = int(1000 * _SECONDS / expected)
    number = repeats or min(max(fitting, _MIN_PAIRS), _MAX_PAIRS)
    pairs = []
    for done in range(number):
        progress("timing", done, number)
        if done % 2:
            after = _time(attached, inputs)
            before = _time(plain, inputs)
        else:
            before = _time(plain, inputs)
            after = _time(attached, inputs)
        pairs.append((before, after))
    return pairs


def _time(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    model(*inputs)
    return 1000 * (time.perf_counter() - start)


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
