"""The operators: torch's requirements, when they run, and what reaches them."""

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
        bool(kernels.cpu.unavailable_reason), reason=kernels.cpu.unavailable_reason or "it is there"
    ),
    # The first forward-mode derivative makes torch script its own formulas.
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
    """Record the operators of simam that run, and whether torch operators do arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.simam: list[str] = []
        self.arithmetic = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "simam":
            self.simam.append(name)
        self.arithmetic |= name.split(".")[0] in ("mean", "sum", "sigmoid")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layout", "statistics"),
    [*((layout, "shared") for layout in LAYOUTS), ("contiguous", "leave_one_out")],
)
@every_dtype
def test_forward_op_and_backward_op_pass_opcheck(
    layout: str, statistics: str, dtype: torch.dtype
) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 5)).to(dtype)
    grad_output = normal(*x.shape, seed=1).to(dtype)
    torch.library.opcheck(torch.ops.simam.forward, (x, 0.1, statistics))
    torch.library.opcheck(torch.ops.simam.backward, (grad_output, x, 0.1, statistics))


def test_simam_runs_the_operators_and_nothing_else() -> None:
    x = normal(2, 3, 4, 5).float().requires_grad_()
    with Calls() as calls:
        output = F.simam(x, 0.1)
        output.backward(torch.ones_like(output))
    assert calls.simam == ["forward", "backward"]
    assert not calls.arithmetic


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of the compiled library."""
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
def test_SimAM_runs_the_kernel(layout: str, dtype: torch.dtype, kernel_calls: list[str]) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 5).to(dtype)).requires_grad_()
    output = SimAM()(x)
    assert kernel_calls == ["forward"]
    output.backward(torch.ones_like(output))
    assert kernel_calls == ["forward", "backward"]


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="this torch does not distinguish export from compilation; both run the reference",
)
@pytest.mark.parametrize("train", [False, True])
def test_SimAM_compiled_runs_the_kernel(train: bool, kernel_calls: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(SimAM(e_lambda=0.1), backend="aot_eager", fullgraph=True)
    x = normal(2, 3, 4, 5).requires_grad_(train)
    output = compiled(x)
    if train:
        output.backward(torch.ones_like(output))
    assert kernel_calls == ["forward", "backward"][: 1 + train]
    torch.testing.assert_close(output, SimAM(e_lambda=0.1)(x))


def test_simam_saves_only_the_input() -> None:
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


REFERENCE = {
    "a subclass": lambda x: F.simam(x.as_subclass(Named)),
    "meta": lambda x: F.simam(x.to("meta")),
    "forward mode": with_tangents,
    "vmap": torch.func.vmap(F.simam),
    "func.grad": torch.func.grad(lambda x: F.simam(x).sum()),
    "other functions": lambda x: (F.attention(x), F.energy(x)),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_simam_runs_the_reference(case: str) -> None:
    with Calls() as calls:
        REFERENCE[case](normal(2, 3, 4, 5, 6))
    assert calls.simam == []
    assert calls.arithmetic


def test_simam_of_a_parameter_runs_the_operator() -> None:
    with Calls() as calls:
        F.simam(nn.Parameter(normal(2, 3, 4, 5)))
    assert calls.simam == ["forward"]


def test_simam_of_a_negated_view() -> None:
    # Its memory holds the opposite signs; torch resolves the view before the operator.
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
def test_simam_gradient_accepts_any_layout(layout: str, consumer: str) -> None:
    gradients = []
    for function in (lambda x: F.simam(x, 0.1), lambda x: reference.forward(x, 0.1, "shared")):
        leaf = normal(2, 3, 4, 5).requires_grad_()
        output = GRADIENTS[consumer](function(LAYOUTS[layout](leaf)))
        grad_output = normal(*output.shape, seed=2)
        gradients += torch.autograd.grad(output, leaf, grad_output)
    torch.testing.assert_close(*gradients)


@both_statistics
def test_simam_double_backward_values(statistics: str) -> None:
    def penalty(function: Callable[..., Tensor]) -> Tensor:
        x = normal(2, 3, 4, 5).requires_grad_()
        output = function(x, 0.1, statistics)
        (gradient,) = torch.autograd.grad(output, x, grad_output, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    grad_output = normal(2, 3, 4, 5, seed=1)
    with Calls() as calls:
        actual = penalty(F.simam_forward)
    assert calls.simam == ["forward"]
    torch.testing.assert_close(actual, penalty(reference.forward))


def test_simam_forward_mode_over_the_gradient_values() -> None:
    def tangent(function: Callable[..., Tensor]) -> Tensor:
        x = normal(2, 3, 4, 5).requires_grad_()
        output = function(x, 0.1, "shared")
        with forward_ad.dual_level():
            grad_output = forward_ad.make_dual(
                normal(2, 3, 4, 5, seed=1), normal(2, 3, 4, 5, seed=2)
            )
            (gradient,) = torch.autograd.grad(output, x, grad_output)
            return forward_ad.unpack_dual(gradient).tangent

    torch.testing.assert_close(tangent(F.simam_forward), tangent(reference.forward))


COMPILED = {
    "plain": lambda f, x, v: f(x),
    "grad": lambda f, x, v: torch.func.grad(lambda x: (v * f(x)).sum())(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(x[None].expand(2, *x.shape)),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: (v * f(x)).sum())(x),
}


@pytest.mark.parametrize("transform", COMPILED)
def test_simam_compiled_transforms_values(transform: str) -> None:
    def transformed(x: Tensor, v: Tensor) -> Tensor:
        return COMPILED[transform](lambda x: F.simam(x, 0.1), x, v)

    torch._dynamo.reset()
    x, v = normal(2, 2, 3, 2), normal(2, 2, 3, 2, seed=1)
    expected = COMPILED[transform](lambda x: reference.forward(x, 0.1, "shared"), x, v)
    actual = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x, v)
    torch.testing.assert_close(actual, expected)


def test_SimAM_exported_graph_holds_only_aten() -> None:
    for strict in (False, True):
        program = torch.export.export(SimAM().eval(), (normal(2, 3, 4, 5),), strict=strict)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called
        assert all(name.startswith("aten.") for name in called)


def test_SimAM_scripted_and_traced_graphs_hold_only_aten() -> None:
    for module in (torch.jit.script(SimAM()), torch.jit.trace(SimAM(), normal(2, 3, 4, 5))):
        graph = str(module.inlined_graph)
        assert "aten::sigmoid" in graph
        assert "simam::" not in graph


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
