"""What SimAM does to a model: where it goes, what it adds, and what it costs in time."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import quantiles
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import __version__
from ..attach import attach
from ..messages import UserError, format_shape, one_line
from ..placement import Insertion, plan
from .models import Subject, options_named, spaced

Progress: TypeAlias = Callable[[str, int, int], None]

_SECONDS = 8.0
_FEWEST_PAIRS, _MOST_PAIRS = 3, 100


@dataclass(frozen=True)
class Place:
    """One SimAM: the convolution it follows, and what comes out there in one forward pass.

    Attributes:
        path (str): the convolution's path in the model.
        block (str): path of the residual block; "" for the model itself.
        conv (str): kind of convolution.
        reason (str): why SimAM goes there.
        shape (list of int or None): output `(N, C, *spatial)` of the convolution's first call;
            None if it is not called.
        calls (int): number of calls.
        elements (int): values that SimAM scales, in all calls together.
    """

    path: str
    block: str
    conv: str
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
        takes (str): what of that shape the model takes: "batch", one tensor; "list", a list of
            images; "pair", two tensors.
        e_lambda (float), statistics (str): the options of SimAM.
        insertions (list of Place): where SimAM goes, in the model's order.
        unanalysed (list of dict): blocks that may be residual but could not be analysed, so
            that they get no SimAM: "block" and "reason".
        elements (int): values that all SimAM layers scale in one forward pass.
        parameters (dict of int): "before" and "after".
        multiply_adds (dict of int): "before" and "after", of one forward pass, as torch's
            counter counts convolutions and matrix products, with two for every element that a
            batch norm normalises. So counts the paper. What other layers do element by element
            is left out, SimAM's work with it.
        forward_ms (dict): time of one forward pass in milliseconds: medians "before" and
            "after", and first and third "before_quartiles" and "after_quartiles".
        ratio (float): the time after by the time before, median over the pairs of passes.
        ratio_quartiles (list of float): first and third quartile of that.
        repeats (int): number of pairs of passes, one before and one after, next to each other.
        threads (int): threads that torch computes with.
        versions (dict of str): of "simam", "torch" and the library.
    """

    model: str
    library: str
    weights: str | None
    input_shape: list[int]
    takes: str
    e_lambda: float
    statistics: str
    insertions: list[Place]
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
    where: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    repeats: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Compare a model with a copy of it that has SimAM; the model itself is not changed.

    Args:
        subject (Subject): the model.
        shape (sequence of int): the input's shape, as from `subject.shape`.
        e_lambda (float): see `simam.attach`.
        statistics (str): see `simam.attach`.
        where (sequence of str, optional): globs, see `simam.plan`.
        exclude (sequence of str, optional): globs, see `simam.plan`.
        repeats (int, optional): pairs of passes to time; by default as many as fit into 8
            seconds, but at least 3 and at most 100.
        progress (callable): called with a stage, the steps done of it, and their number.

    Raises:
        UserError: SimAM goes nowhere in this model, or the model does not take the input.
    """
    plain, inputs = subject.model, subject.inputs(shape)
    progress("planning", 0, 1)
    with options_named():
        planned = plan(plain, where=where, exclude=exclude)
        outputs: dict[str, list[torch.Size]] = {insertion.path: [] for insertion in planned}
        attached = attach(
            copy.deepcopy(plain),
            e_lambda=e_lambda,
            statistics=statistics,
            where=lambda path, _: path in outputs,
        )

    with torch.no_grad():
        hooks = [_record(plain.get_submodule(path), sizes) for path, sizes in outputs.items()]
        try:
            progress("counting", 0, 2)
            before = _multiply_adds(plain, inputs)
            progress("counting", 1, 2)
            after = _multiply_adds(attached, inputs)
        except Exception as error:  # the model's own code, on a shape of the user's choice
            raise UserError(
                f"{subject.name} cannot take an input of shape {format_shape(shape)} "
                f"({one_line(error)}); "
                f"give another --input-size than {spaced(shape[1:])}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        pairs = _time_pairs(plain, attached, inputs, repeats, progress)

    places = [_place(insertion, outputs[insertion.path]) for insertion in planned]
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
        insertions=places,
        unanalysed=[{"block": u.block, "reason": u.reason} for u in planned.unanalysed],
        elements=sum(place.elements for place in places),
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


def _place(insertion: Insertion, sizes: Sequence[torch.Size]) -> Place:
    shape = list(sizes[0]) if sizes else None
    return Place(
        **asdict(insertion), shape=shape, calls=len(sizes), elements=sum(map(math.prod, sizes))
    )


def _record(module: nn.Module, sizes: list[torch.Size]) -> torch.utils.hooks.RemovableHandle:
    def record(_module: nn.Module, _args: Any, output: Tensor) -> None:
        sizes.append(output.shape)

    return module.register_forward_hook(record)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    def batch_norm(shape: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 4 * math.prod(shape)  # two multiply-adds are four operations

    aten = torch.ops.aten
    # The first becomes one of the others where torch's decompositions are imported.
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
    """Milliseconds of both, in turns so that a change of the machine's speed meets both."""
    progress("warming up", 0, 1)
    expected = _time(plain, inputs) + _time(attached, inputs)
    fitting = int(1000 * _SECONDS / expected)
    number = repeats or min(max(fitting, _FEWEST_PAIRS), _MOST_PAIRS)
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
