"""Facts about `place="norm"` and `place="branch"` in torchvision's networks, from a recorded run.

Nothing here comes from the library: the network runs on real inputs, hooks record what every module
takes and returns, and a torch function mode records what every function does. The convolutions are
those of `insertion_points.json`. `python -m tests.helpers.place_facts` writes the facts again, to
tests/placement/place_points.json.
"""

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

FACTS = Path(__file__).parents[1] / "placement"

# The classes of torchvision's residual blocks.
BLOCKS = {
    "BasicBlock", "Bottleneck", "BottleneckBlock", "CNBlock", "FusedMBConv", "InvertedResidual",
    "MBConv", "ResBottleneckBlock", "ResidualBlock", "_InvertedResidual",
}  # fmt: skip
NORMS = {
    "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm",
    "LayerNorm2d",
}  # fmt: skip
ADDS = {"torch.Tensor.add", "torch.Tensor.__add__", "torch.add"}
IN_PLACE_ADDS = {"torch.Tensor.__iadd__", "torch.Tensor.add_"}


class ModuleCall(NamedTuple):
    """One call of a module; tensors are compared as objects."""

    path: str
    inputs: list[Tensor]
    output: Any


class FunctionCall(NamedTuple):
    """One call of a function of torch, with the innermost block around it."""

    name: str
    block: str | None
    inputs: list[Tensor]
    output: Tensor


class Recorder(TorchFunctionMode):
    """Records every call of a module and of a function while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules: list[ModuleCall] = []
        self.functions: list[FunctionCall] = []
        self.stack: list[str | None] = [None]
        for path, module in model.named_modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # an activation in place would return its input
            is_block = type(module).__name__ in BLOCKS
            module.register_forward_pre_hook(self._entering(path if is_block else None))
            module.register_forward_hook(self._leaving(path))

    def _entering(self, block: str | None) -> Any:
        return lambda module, inputs: self.stack.append(block or self.stack[-1])

    def _leaving(self, path: str) -> Any:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.stack.pop()
            self.modules.append(ModuleCall(path, list(_tensors(inputs)), output))

        return leave

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = resolve_name(func) or ""
        if (
            name in IN_PLACE_ADDS
        ):  # out of place, so that the operand keeps its own gradient function
            func, name = torch.Tensor.add, "torch.Tensor.add"
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor | tuple | list):
            inputs = list(_tensors([args, kwargs or {}]))
            self.functions += [
                FunctionCall(name, self.stack[-1], inputs, o)
                for o in _tensors(output)
                if not any(o is i for i in inputs)
            ]
        return output


class AbsentError(Exception):
    """A block has no host at the place; the message is the function in its way."""


class Facts:
    """The hosts of one network, from one recorded run."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.modules = dict(model.named_modules())
        recorder = Recorder(model.eval())
        with recorder:
            model(*inputs)
        self.calls = recorder.modules
        self.functions = recorder.functions

    def hosts(self, convolutions: Iterable[str], place: str) -> tuple[list[str], dict[str, Any]]:
        """The hosts at a place, and the blocks without one by the function in their way."""
        hosts, absent = set(), {}
        for convolution in convolutions:
            block = self._block(convolution)
            try:
                (call,) = self._calls_of(convolution)
                find = self._norm if place == "norm" else self._end
                hosts.add(self._outermost(find(call.output, block), block))
            except AbsentError as error:
                absent.setdefault(str(error), set()).add(block)
        return sorted(hosts), {kind: sorted(blocks) for kind, blocks in absent.items()}

    def _block(self, path: str) -> str:
        """The innermost block around a module."""
        around = [p for p in self.modules if path.startswith(f"{p}.") and self._kind(p) in BLOCKS]
        return max(around, key=len)

    def _kind(self, path: str) -> str:
        return type(self.modules[path]).__name__

    def _calls_of(self, path: str) -> list[ModuleCall]:
        return [call for call in self.calls if call.path == path]

    def _norm(self, value: Tensor, block: str) -> Tensor:
        """What the norm returns whose input is the value."""
        (user,) = self._users(value)
        for call in self.calls:
            if self._kind(call.path) in NORMS and call.inputs[0] is value:
                return call.output
        raise AbsentError(user.name.rpartition(".")[2])

    def _end(self, value: Tensor, block: str) -> Tensor:
        """The operand of the block's add that depends on the value, or what the block returns."""
        (call,) = self._calls_of(block)
        ends = []
        for add in self.functions:
            if add.name in ADDS and add.block == block and len(add.inputs) == 2:
                is_end = [_depends(operand, value) for operand in add.inputs]
                is_residual = all(_depends(operand, call.inputs[0]) for operand in add.inputs)
                if is_residual and sum(is_end) == 1:
                    ends.append(add.inputs[is_end.index(True)])
        if not ends:
            return call.output
        (end,) = ends
        assert len(self._users(end)) == 1
        return end

    def _outermost(self, value: Tensor, block: str) -> str:
        """The outermost module within the block that computes the value."""
        paths = [
            call.path
            for call in self.calls
            if call.output is value
            and call.path.startswith(f"{block}.")
            and not any(i is value for i in call.inputs)  # dropout returns its input
            and not isinstance(self.modules[call.path], nn.Sequential)
            and len(self._calls_of(call.path)) == 1
        ]
        if paths:
            return min(paths, key=len)
        (function,) = [call for call in self.functions if call.output is value]
        raise AbsentError(function.name.rpartition(".")[2])

    def _users(self, value: Tensor) -> list[FunctionCall]:
        return [call for call in self.functions if any(i is value for i in call.inputs)]


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _depends(value: Tensor, on: Tensor) -> bool:
    """Whether the gradient of a tensor reaches another tensor."""
    if value is on:
        return True
    if value.grad_fn is None or not on.requires_grad:
        return False
    target = torch.autograd.graph.get_gradient_edge(on).node
    seen, ahead = set(), [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is target:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return False


def build(name: str) -> nn.Module:
    """The network of torchvision with random weights."""
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options: dict[str, Any] = {o: None for o in ("weights", "weights_backbone") if o in accepted}
    if any(part in name for part in ("rcnn", "fcos", "retinanet")):
        options |= {"min_size": 64, "max_size": 64}
    if "rcnn" in name:
        options |= {"box_detections_per_img": 1}
    torch.manual_seed(0)
    return builder(**options)


def example(name: str) -> tuple[Any, ...]:
    """Arguments of the forward: as small as the network allows."""
    if "raft" in name:
        return tuple(torch.rand(1, 3, 128, 128, requires_grad=True) for _ in range(2))
    if any(part in name for part in ("rcnn", "fcos", "retinanet", "ssdlite")):
        return ([torch.rand(3, 64, 64, requires_grad=True)],)
    size = {"r3d_18": (4, 32, 32), "mc3_18": (4, 32, 32), "r2plus1d_18": (4, 32, 32)}
    size |= {"maxvit_t": (224, 224)}
    return (torch.rand(1, 3, *size.get(name, (64, 64)), requires_grad=True),)


def record(name: str) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The hosts of a network at both places, and the blocks without one."""
    convolutions = json.loads((FACTS / "insertion_points.json").read_text())["torchvision"]
    facts = Facts(build(name), example(name))
    return {place: facts.hosts(convolutions[name], place) for place in ("norm", "branch")}


def main() -> None:
    facts: dict[str, Any] = {"norm": {}, "branch": {}, "none": {"norm": {}, "branch": {}}}
    for name in sorted(json.loads((FACTS / "insertion_points.json").read_text())["torchvision"]):
        for place, (hosts, absent) in record(name).items():
            facts[place] |= {name: hosts} if hosts else {}
            facts["none"][place] |= {name: absent} if absent else {}
    (FACTS / "place_points.json").write_text(json.dumps(facts, indent=0) + "\n")


if __name__ == "__main__":
    main()
