"""Attached networks through torch.compile, and attach before and after it."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from simam import SimAM, attach, detach, plan
from tests.helpers.by_hand import example, networks, plain
from tests.helpers.tiny_blocks import basic, conv


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(), nn.BatchNorm2d(8), basic(), basic(conv2=conv(5))).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", networks())
def test_compile_makes_one_graph(name: str) -> None:
    model, images = attach(plain(name).eval(), e_lambda=0.1), example(name)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.skipif(not shutil.which("c++"), reason="inductor compiles C++ on the CPU")
def test_compile_trains_with_inductor(net: nn.Module, x: Tensor) -> None:
    attach(net.train(), e_lambda=0.1)
    compiled = torch.compile(net, fullgraph=True)
    gradients = []
    for network in (net, compiled):
        output = network(x)
        output.backward(x)
        gradients.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(*gradients)


def test_attach_and_detach_after_compile(net: nn.Module, x: Tensor) -> None:
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    plain_output = compiled(x)
    attach(net)
    attached_output = compiled(x)
    assert torch.equal(attached_output, net(x))
    assert not torch.allclose(attached_output, plain_output)
    attach(net, e_lambda=10.0)
    assert torch.equal(compiled(x), net(x))
    assert not torch.allclose(compiled(x), attached_output)
    detach(net)
    assert torch.equal(compiled(x), plain_output)


def test_attach_to_a_compiled_model(net: nn.Module, x: Tensor) -> None:
    expected = attach(net, e_lambda=0.1)(x)
    compiled = torch.compile(detach(net), backend="eager", fullgraph=True)
    before = compiled(x)
    assert attach(compiled, e_lambda=0.1) is compiled
    assert [i.path for i in plan(compiled)] == ["_orig_mod.2.conv2", "_orig_mod.3.conv2"]
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(detach(compiled)(x), before)


def test_attach_to_a_model_compiled_in_place(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = attach(net, e_lambda=0.1)(x)
        detach(net).compile(backend="eager", fullgraph=True)
        before = net(x)
        torch.testing.assert_close(attach(net, e_lambda=0.1)(x), expected)
        assert torch.equal(detach(net)(x), before)


def test_torchscript_matches_eager(net: nn.Module, x: Tensor) -> None:
    expected = attach(net, e_lambda=0.1)(x)
    scripted = torch.jit.script(net[2].conv2)
    # TorchScript runs plain torch operations, and the layer the fused kernel.
    torch.testing.assert_close(scripted(x), net[2].conv2(x))
    torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)
    with pytest.raises(ValueError, match=r"^a TorchScript module cannot be changed"):
        attach(scripted)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_torchscript_scripts_convolutions_of_torch(kind: type[nn.Module]) -> None:
    layer = attach(kind(2, 3, 3), where="")
    x = torch.randn(2, 2, *(6,) * (layer.weight.dim() - 2))
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_symbolic_trace_matches_eager(net: nn.Module, x: Tensor) -> None:
    net.append(SimAM())
    traced = torch.fx.symbolic_trace(attach(net, e_lambda=0.1))
    assert torch.equal(traced(x), net(x))
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called >= {"2.conv2", "3.conv2"}
