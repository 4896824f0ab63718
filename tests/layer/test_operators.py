"""The operators: what torch asks of them, when they run, and what reaches them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from simam import SimAM, kernels, reference
from simam import functional as F
from tests.helpers.oracles import assert_close

STATISTICS = ("shared", "leave_one_out")
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "one channel": lambda x: x[:, :1].contiguous(),
    "one position": lambda x: x.flatten(2)[..., :1].contiguous()[..., None],
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].reshape(x.shape),
}

pytestmark = [
    pytest.mark.skipif(
        bool(kernels.cpu.unavailable_reason),
        reason=kernels.cpu.unavailable_reason or "it is there",
    ),
    # The first forward-mode derivative scripts the formulas that torch keeps for it.
    pytest.mark.filterwarnings(
        r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning",
        r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
    ),
]
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


class Calls(TorchDispatchMode):
    """The operators of simam that run, and whether any of torch's takes part in the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.arithmetic = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "simam":
            self.ours.append(name)
        self.arithmetic |= name.split(".")[0] in ("mean", "sum", "sigmoid")
        return function(*args, **(kwargs or {}))


@every_layout
@both_statistics
@every_dtype
def test_opcheck(layout: str, statistics: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 5)).to(dtype)
    grad = normal(*x.shape, seed=1).to(dtype)
    torch.library.opcheck(torch.ops.simam.forward, (x, 0.1, statistics))
    torch.library.opcheck(torch.ops.simam.backward, (grad, x, 0.1, statistics))


def test_the_operators_run_and_nothing_else() -> None:
    x = normal(2, 3, 4, 5).float().requires_grad_()
    with Calls() as calls:
        output = F.simam(x, 0.1)
        output.backward(torch.ones_like(output))
    assert calls.ours == ["forward", "backward"]
    assert not calls.arithmetic


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the compiled library."""
    calls = []
    library = kernels.cpu._library

    class Recorder:
        def simam_forward(self, *args: object) -> int:
            calls.append("forward")
            return library.simam_forward(*args)

        def simam_backward(self, *args: object) -> int:
            calls.append("backward")
            return library.simam_backward(*args)

    monkeypatch.setattr(kernels.cpu, "_library", Recorder())
    return calls


@every_layout
@every_dtype
def test_the_kernel_runs(layout: str, dtype: torch.dtype, runs: list[str]) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 5).to(dtype)).requires_grad_()
    output = SimAM()(x)
    assert runs == ["forward"]
    output.backward(torch.ones_like(output))
    assert runs == ["forward", "backward"]


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="this torch cannot tell export from compilation, so both run the reference",
)
@pytest.mark.parametrize("train", [False, True])
def test_compiled_code_runs_the_kernel(train: bool, runs: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(SimAM(e_lambda=0.1), backend="aot_eager", fullgraph=True)
    x = normal(2, 3, 4, 5).requires_grad_(train)
    output = compiled(x)
    if train:
        output.backward(torch.ones_like(output))
    assert runs == ["forward", "backward"][: 1 + train]
    torch.testing.assert_close(output, SimAM(e_lambda=0.1)(x))


def test_the_input_alone_is_saved() -> None:
    x = normal(2, 3, 4, 5).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        F.simam(x)
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


class Named(Tensor):
    pass


def with_tangents(x: Tensor) -> None:
    with forward_ad.dual_level():
        F.simam(forward_ad.make_dual(x, x))
        F.simam(x)


COMPOSITE = {
    "a subclass": lambda x: F.simam(x.as_subclass(Named)),
    "without values": lambda x: F.simam(x.to("meta")),
    "forward mode": with_tangents,
    "vmap": torch.func.vmap(F.simam),
    "func.grad": torch.func.grad(lambda x: F.simam(x).sum()),
    "other functions": lambda x: (F.attention(x), F.energy(x)),
}


@pytest.mark.parametrize("case", COMPOSITE)
def test_what_the_composite_takes(case: str) -> None:
    with Calls() as calls:
        COMPOSITE[case](normal(2, 3, 4, 5, 6))
    assert calls.ours == []
    assert calls.arithmetic


def test_a_parameter_takes_the_operator() -> None:
    with Calls() as calls:
        F.simam(nn.Parameter(normal(2, 3, 4, 5)))
    assert calls.ours == ["forward"]


def test_a_negated_view_is_negated() -> None:
    # Its memory holds the opposite numbers, which torch undoes before the operator.
    x = torch.complex(normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)).conj().imag
    assert x.is_neg()
    assert_close(F.simam(x, 0.1), reference.forward(x.clone(), 0.1, "shared"))


GRADIENTS = {
    "cat": lambda y: torch.cat([y, 2 * y], 1),
    "slice": lambda y: y[:, :, 1:],
    "every other": lambda y: y[..., ::2],
    "expand": lambda y: y[None].expand(3, *y.shape),
    "sum": lambda y: y.sum((0, 2)),
    "transpose": lambda y: y.transpose(0, 1),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last) * 1,
    "contiguous": lambda y: y.contiguous(memory_format=torch.contiguous_format) * 1,
}


@every_layout
@pytest.mark.parametrize("consumer", GRADIENTS)
def test_gradient_that_arrives_in_any_layout(layout: str, consumer: str) -> None:
    leaf, reference = (normal(2, 3, 4, 5).requires_grad_() for _ in range(2))
    ours = GRADIENTS[consumer](F.simam(LAYOUTS[layout](leaf), 0.1))
    theirs = GRADIENTS[consumer](reference.forward(LAYOUTS[layout](reference), 0.1, "shared"))
    pull = normal(*theirs.shape, seed=2)
    (actual,) = torch.autograd.grad(ours, leaf, pull)
    (expected,) = torch.autograd.grad(theirs, reference, pull)
    torch.testing.assert_close(actual, expected)


@both_statistics
def test_double_backward_by_value(statistics: str) -> None:
    def penalty(function: Callable[..., Tensor]) -> Tensor:
        x = normal(2, 3, 4, 5).requires_grad_()
        output = function(x, 0.1, statistics)
        (gradient,) = torch.autograd.grad(output, x, pull, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    pull = normal(2, 3, 4, 5, seed=1)
    with Calls() as calls:
        actual = penalty(F.scale)
    assert calls.ours == ["forward"]
    torch.testing.assert_close(actual, penalty(reference.forward))


def test_forward_mode_over_the_gradient_by_value() -> None:
    def tangent(function: Callable[..., Tensor]) -> Tensor:
        x = normal(2, 3, 4, 5).requires_grad_()
        output = function(x, 0.1, "shared")
        with forward_ad.dual_level():
            pull = forward_ad.make_dual(normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2))
            (gradient,) = torch.autograd.grad(output, x, pull)
            return forward_ad.unpack_dual(gradient).tangent

    torch.testing.assert_close(tangent(F.scale), tangent(reference.forward))


COMPILED = {
    "plain": lambda f, x, v: f(x),
    "grad": lambda f, x, v: torch.func.grad(lambda x: (v * f(x)).sum())(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(x[None].expand(2, *x.shape)),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: (v * f(x)).sum())(x),
}


@pytest.mark.parametrize("transform", COMPILED)
def test_compiled_transforms_by_value(transform: str) -> None:
    def ours(x: Tensor, v: Tensor) -> Tensor:
        return COMPILED[transform](lambda x: F.simam(x, 0.1), x, v)

    torch._dynamo.reset()
    x, v = normal(2, 2, 3, 2), normal(2, 2, 3, 2, seed=1)
    expected = COMPILED[transform](lambda x: reference.forward(x, 0.1, "shared"), x, v)
    actual = torch.compile(ours, backend="aot_eager", fullgraph=True)(x, v)
    torch.testing.assert_close(actual, expected)


def test_exported_graphs_hold_torch_alone() -> None:
    for strict in (False, True):
        program = torch.export.export(SimAM().eval(), (normal(2, 3, 4, 5),), strict=strict)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called
        assert all(name.startswith("aten.") for name in called)


def test_scripted_and_traced_graphs_hold_torch_alone() -> None:
    for module in (torch.jit.script(SimAM()), torch.jit.trace(SimAM(), normal(2, 3, 4, 5))):
        graph = str(module.inlined_graph)
        assert "aten::sigmoid" in graph
        assert "simam::" not in graph


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
