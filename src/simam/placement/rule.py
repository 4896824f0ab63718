"""The rule: SimAM follows the last spatial convolutions of every residual block.

Source: the authors' networks (Yang et al., ICML 2021, section 4), stated as a rule. `dataflow.py`
computes the branch of a residual block. A block without a skip, because it changes the shape,
counts if blocks of its class are residual elsewhere in the model. Every candidate block is analysed
alone: a block that cannot be traced costs only itself, and is reported. See README.md in this
folder for a worked example.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from torch import nn

from ..guards import is_adapter
from ..messages import one_line
from ..module import SimAM
from .candidates import may_be_residual
from .convolutions import (
    holds_spatial_convolution,
    is_convolution,
    kernel_size,
    plain_class,
    within_adapters,
)
from .dataflow import ADD, BlockGraph, Branch
from .example import Example, holds_values
from .existing import ExistingSimAM, existing_in_branch, find_layers, is_within, join
from .place import NoHostError, find_hosts
from .tracing import Trace, traces

if TYPE_CHECKING:
    from .recording import Recording


@dataclass(frozen=True)
class Insertion:
    """One SimAM in a network.

    Attributes:
        path (str): the path of the host, the module whose output passes through SimAM.
        block (str): the path of the residual block; "" is the model itself.
        host (str): the kind of the host, such as "Conv2d 3x3".
        reason (str): why SimAM goes there.
    """

    path: str
    block: str
    host: str
    reason: str


@dataclass(frozen=True)
class Unanalysed:
    """A block that may be residual, but could not be traced or has no host. It gets no SimAM.

    Attributes:
        block (str): the path of the block; "" is the model itself.
        reason (str): the class of the block, and the error that stopped the trace, or why no module
            can be the host.
        needs_example (bool): whether the block could not be traced, and no example was given.
    """

    block: str
    reason: str
    needs_example: bool = False


def find_insertions(
    model: nn.Module, place: str, example: Example | None = None
) -> tuple[list[Insertion], list[Unanalysed], list[ExistingSimAM]]:
    """Apply the rule to every block of the model, without running or changing the model.

    Args:
        model (nn.Module): the model.
        place (str): "conv", "norm" or "branch".
        example (Tensor, tuple or mapping, optional): what the model takes. With it, a copy of the
            model runs once, and the blocks are analysed by what they did.

    Returns:
        tuple: the insertions in the model's order; the blocks that may be residual but get no
            SimAM; and the SimAM that is there already, in blocks that get no second one.
    """
    graphs, unanalysed = _analyse_blocks(model, example)
    blocks = _residual_blocks(graphs)
    layers = find_layers(model)
    insertions: dict[str, Insertion] = {}
    without_host: list[Unanalysed] = []
    existing: list[ExistingSimAM] = []
    # named_modules() lists a module that stands at several paths once, at the first of them.
    paths = {module: path for path, module in model.named_modules()}
    occurrences = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    shared = {module for module, count in occurrences.items() if count > 1}

    for path, (of_what, branches) in blocks.items():
        graph = graphs[path]
        for branch in branches:
            present = existing_in_branch(branch, path, graph, layers, blocks.keys())
            if present:
                existing += present
                continue
            try:
                hosts = find_hosts(graph, branch, place, shared)
            except NoHostError as error:
                kind = graph.kind.__name__
                reason = f"{kind}, no host for place={place!r}: {error}"
                without_host.append(Unanalysed(path, reason))
                continue
            for relative, what in hosts:
                host = model.get_submodule(join(path, relative))
                reason = f"{what} of {of_what}"
                insertions[paths[host]] = Insertion(paths[host], path, describe_host(host), reason)

    # A container that cannot be traced costs nothing if its residual blocks were analysed.
    containers = {path[:i] for path in insertions for i, c in enumerate(path) if c == "."}
    unanalysed = [
        u for u in unanalysed if u.block not in containers and (u.block or not insertions)
    ]
    found = [insertions[path] for path in paths.values() if path in insertions]
    # Sums within a branch may have no host at a later place, where the sum at its end has one.
    served = {insertion.block for insertion in found} if place != "conv" else set()
    unanalysed += [u for u in dict.fromkeys(without_host) if u.block not in served]
    return found, unanalysed, list(dict.fromkeys(existing))


def _analyse_blocks(
    model: nn.Module, example: Example | None
) -> tuple[dict[str, BlockGraph], list[Unanalysed]]:
    if example is None:
        return _analyse_with(model, None)
    from .recording import record  # not before an example is given

    recording = record(model, example, _is_leaf)
    graphs, unanalysed = _analyse_with(model, recording)
    if unanalysed and recording.reads_values and holds_values(example):
        recording = record(model, example, _is_leaf, with_values=True)
        graphs, unanalysed = _analyse_with(model, recording)
    why = "; it did not run on the example"
    if recording.reads_values:
        why = (
            "; the model reads a value in Python, where the run on an example without values "
            "stopped: give an example with values, on the CPU"
        )
    return graphs, [replace(u, reason=u.reason + why, needs_example=False) for u in unanalysed]


def _analyse_with(
    model: nn.Module, recording: "Recording | None"
) -> tuple[dict[str, BlockGraph], list[Unanalysed]]:
    """Analyse every block that may be residual, by its recorded calls or else by its code."""
    graphs: dict[str, BlockGraph] = {}
    unanalysed: list[Unanalysed] = []
    with_sums = recording.blocks_with(ADD, holds_spatial_convolution) if recording else set()
    for path, block in model.named_modules():
        by_code = may_be_residual(block)
        if by_code or block in with_sums:
            # Where the code shows no sum, the recorded ones are all there are.
            recorded = recording.traces(block, unfinished=not by_code) if recording else iter(())
            try:
                graphs[path] = _analyse(block, recorded)
            except Exception as error:  # the block's own code, run on symbols, may raise anything
                reason = f"{plain_class(block).__name__}, {one_line(error, 100)}"
                unanalysed.append(Unanalysed(path, reason, needs_example=True))
    return graphs, unanalysed


def _residual_blocks(graphs: dict[str, BlockGraph]) -> dict[str, tuple[str, list[Branch]]]:
    """The blocks that count as residual, each with the words for its branches."""
    branches = _branches_within_stages(graphs)
    modules_of_kinds: dict[type, set[str]] = {}
    for path, found in branches.items():
        for branch in found:
            targets = {str(node.target) for node in branch.nodes if node.op == "call_module"}
            modules_of_kinds.setdefault(graphs[path].kind, set()).update(targets)
    blocks = {}
    for path, graph in graphs.items():
        name = graph.kind.__name__
        if not branches[path] and graph.kind in modules_of_kinds:
            branches[path] = graph.branches_like(modules_of_kinds[graph.kind])
        if branches[path]:
            blocks[path] = (f"the residual branch of {name}", branches[path])
        elif graph.kind in modules_of_kinds or _is_skipless(graph):
            whole = graph.whole()
            if whole and whole.last:
                blocks[path] = (f"{name}, whose skip is off here", [whole])
    return blocks


def _branches_within_stages(graphs: dict[str, BlockGraph]) -> dict[str, list[Branch]]:
    """The residual branches of every block; of a network as a whole, only those within a stage.

    The network is the module that holds all residual blocks, or the model itself. A sum in its own
    code may join streams of different resolutions, fuse stages, or update a recurrent state.
    """
    branches = {path: graph.branches for path, graph in graphs.items()}
    residual = [path for path, found in branches.items() if found]
    for path in residual:
        inner = {p.removeprefix(f"{path}.") for p in residual if is_within(p, path)}
        if not path or len(inner) == len(residual) - 1 > 0:
            graph = graphs[path]
            branches[path] = [b for b in branches[path] if graph.is_within_a_stage(b, inner)]
    return branches


def describe_host(host: nn.Module) -> str:
    """The kind of a host, such as "Conv2d 3x3"; with SimAM attached it is the same."""
    kind = plain_class(within_adapters(host)).__name__
    kernel = "x".join(map(str, kernel_size(host)))
    return f"{kind} {kernel}".rstrip() + " with its adapter" * is_adapter(host)


def _analyse(block: nn.Module, recorded: Iterator[Trace]) -> BlockGraph:
    """The graph of the first call that is residual, or else of the first call.

    A block without recorded calls is traced; then paths through its control flow count as calls.
    """
    first = next(recorded, None)
    calls = chain([first], recorded) if first else traces(block, _is_leaf, _is_optional)
    graphs = []
    for call in calls:
        graphs.append(BlockGraph(block, call))
        if graphs[-1].branches:
            return graphs[-1]
    return graphs[0]


def _is_optional(module: nn.Module) -> bool:
    return not holds_spatial_convolution(module)


def _is_leaf(module: nn.Module) -> bool:
    return is_convolution(module) or isinstance(module, SimAM)


def _is_skipless(graph: BlockGraph) -> bool:
    """Whether the block belongs to timm's inverted-residual family and has its skip turned off.

    In a network such as MobileNetV1, where no block has a skip, `has_skip` is the only sign. A
    single convolution with a norm (timm's ConvBnAct) belongs to the family only where it adds.
    """
    return getattr(graph.block, "has_skip", None) is False and graph.is_deep()
