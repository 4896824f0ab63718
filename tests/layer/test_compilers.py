"""torch.compile, torch.export, torch.jit.script and torch.jit.trace, with other sizes."""

import os
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from simam import SimAM
from simam import functional as F

STATISTICS = ("shared", "leave_one_out")

each_implementation = pytest.mark.usefixtures("implementation")
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)

# torch deprecates TorchScript, but people still ship scripted and traced models, and torch.compile
# imports scripted functions.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning",
    r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
)


class Block(nn.Module):
    """The layer in its usual place: after a convolution and before a norm."""

    def __init__(self, statistics: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
        self.attention = SimAM(4, 0.1, statistics=statistics)
        self.norm = nn.BatchNorm2d(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(self.conv(x)))


@each_implementation
@both_statistics
def test_SimAM_compiles_to_one_graph_for_every_size(statistics: str, device: torch.device) -> None:
    torch._dynamo.reset()
    layer = SimAM(e_lambda=0.1, statistics=statistics)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    check(compiled, layer, normal(2, 3, 4, 5).to(device))
    # The first call may compile twice, the second time with lambda as a constant.
    graphs = counter.frame_count
    for shape in [(3, 2, 7, 6), (5, 4, 3, 2)]:
        check(compiled, layer, normal(*shape).to(device))
    assert counter.frame_count == graphs
    # torch always recompiles for sizes of 1.
    check(compiled, layer, normal(2, 3, 1, 1).to(device))


@each_implementation
def test_simam_compiled_accepts_other_lambdas(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(F.simam, backend="aot_eager", fullgraph=True, dynamic=True)
    x = normal(2, 3, 4, 5).to(device)
    for e_lambda in (0.1, 0.2, 10.0):
        torch.testing.assert_close(compiled(x, e_lambda), F.simam(x, e_lambda))


@each_implementation
def test_SimAM_is_one_node_in_an_fx_graph(device: torch.device) -> None:
    block = Block("leave_one_out").to(device)
    traced = torch.fx.symbolic_trace(block)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [F.simam_forward]
    x = normal(2, 3, 5, 6).to(device)
    assert torch.equal(traced(x), block(x))


@both_statistics
def test_attention_and_energy_compile(statistics: str, device: torch.device) -> None:
    for function in (F.attention, F.energy):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for shape in [(2, 3, 4), (2, 3, 7)]:
            x = normal(*shape).to(device)
            expected = function(x, 0.1, statistics=statistics)
            torch.testing.assert_close(compiled(x, 0.1, statistics=statistics), expected)


@each_implementation
@pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])),
    reason="the default backend needs a C++ compiler",
)
def test_SimAM_compiles_with_the_default_backend(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = SimAM(e_lambda=0.1)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for shape in [(2, 3, 4, 5), (3, 2, 7, 6)]:
        check(compiled, layer, normal(*shape).to(device))


@each_implementation
@both_statistics
def test_SimAM_exports_with_dynamic_batch_and_size(statistics: str, device: torch.device) -> None:
    layer = SimAM(e_lambda=0.1, statistics=statistics)
    sizes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = export(layer, (normal(2, 3, 4, 5).to(device),), dynamic_shapes=(sizes,))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    ops = {target for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert {op.namespace for op in ops} == {"aten"}
    # The rest is arithmetic on sizes.
    assert {function.__module__ for function in targets - ops} == {"_operator"}
    for shape in [(1, 3, 4, 5), (3, 3, 7, 6), (2, 3, 1, 1), (1, 3, 1, 9)]:
        x = normal(*shape).to(device)
        torch.testing.assert_close(program.module()(x), layer(x))


@both_statistics
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_SimAM_exported_graph_has_no_conversion(statistics: str, dtype: torch.dtype) -> None:
    program = export(SimAM(statistics=statistics), (normal(2, 3, 4, 5).to(dtype),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if "to" in target.split(".") or "copy" in target]
    # ExecuTorch leaves the sum to slower code, and an integer is converted where the graph runs.
    assert "aten.sum.dim_IntList" not in targets
    numbers = {type(arg) for node in program.graph.nodes for arg in node.args}
    assert int not in numbers


@each_implementation
@both_statistics
def test_SimAM_exports_within_a_network(statistics: str) -> None:
    network = Block(statistics).eval()
    sizes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = export(network, (normal(2, 3, 4, 5),), dynamic_shapes=(sizes,))
    for shape in [(1, 3, 1, 1), (3, 3, 7, 6)]:
        x = normal(*shape)
        torch.testing.assert_close(program.module()(x), network(x))


@each_implementation
@both_statistics
@pytest.mark.parametrize("network", [lambda s: SimAM(3, 0.1, statistics=s), Block])
def test_SimAM_scripted_values(
    network: Callable[[str], nn.Module], statistics: str, device: torch.device
) -> None:
    network = network(statistics).to(device)
    scripted = torch.jit.script(network)
    for shape in [(2, 3, 4, 5), (3, 3, 7, 6), (2, 3, 1, 1)]:
        check(scripted, network, normal(*shape).to(device))


@each_implementation
@both_statistics
def test_SimAM_scripted_accepts_every_rank_and_dtype(statistics: str, device: torch.device) -> None:
    layer = SimAM(e_lambda=0.1, statistics=statistics)
    scripted = torch.jit.script(layer)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in [(2, 3, 4), (2, 3, 4, 5, 2), (2, 3, 1, 2, 3, 2), (0, 3, 4)]:
            x = normal(*shape).to(device, dtype)
            output = scripted(x)
            assert output.dtype == dtype
            torch.testing.assert_close(output, layer(x))


def test_SimAM_scripted_refuses_the_inputs_that_SimAM_refuses() -> None:
    scripted = torch.jit.script(SimAM())
    for x, message in [
        (torch.ones(4, 5), r"ValueError: x must have shape \(N, C, \*spatial\), got \[4, 5\]"),
        (torch.ones(1, 2, 3, 0), "ValueError: x must have at least one position in each spatial"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "TypeError: x must be a floating-point tensor"),
    ]:
        with pytest.raises(torch.jit.Error, match=message):
            scripted(x)


@each_implementation
@both_statistics
@pytest.mark.parametrize("network", [lambda s: SimAM(3, 0.1, statistics=s), Block])
@pytest.mark.parametrize(
    "traced_shape",
    [
        (2, 3, 4, 5),
        (2, 3, 1, 1),  # a branch on M = 1 would be fixed in the graph
    ],
)
def test_SimAM_traced_generalises_to_other_sizes(
    network: Callable[[str], nn.Module],
    statistics: str,
    traced_shape: tuple[int, ...],
    device: torch.device,
) -> None:
    network = network(statistics).to(device).eval()
    traced = torch.jit.trace(network, normal(*traced_shape).to(device))
    for shape in [(2, 3, 4, 5), (3, 3, 7, 6), (2, 3, 1, 1), (1, 3, 1, 9)]:
        check(traced, network, normal(*shape).to(device))


def check(transformed: nn.Module, module: nn.Module, x: Tensor) -> None:
    """Assert equal outputs, and equal gradients for a random gradient of the output."""
    grad_output = None
    results = []
    for function in (module, transformed):
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        if grad_output is None:
            grad_output = normal(*output.shape, seed=1).to(output)
        (gradient,) = torch.autograd.grad(output, leaf, grad_output)
        results.append((output.detach(), gradient))
    torch.testing.assert_close(results[1], results[0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    # Float64, because a gradient through a norm is ill-conditioned, and sums may differ in order.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
