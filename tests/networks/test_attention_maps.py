"""Attention maps: the gates match the definition, and the model is left unchanged."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import simam
from simam.attention_maps import attention_maps
from tests.helpers import oracles
from tests.helpers.oracles import assert_close


def gate(x: Tensor, e_lambda: float, statistics: str = "shared") -> Tensor:
    return oracles.gate(oracles.each_channel(oracles.ENERGY[statistics], x, e_lambda))


class Net(nn.Module):
    """A convolution to attach SimAM to, a batch norm, dropout, and a SimAM of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.simam = simam.SimAM(e_lambda=0.5, statistics="leave_one_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.simam(self.drop(self.norm(self.conv(x))).relu())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean = torch.randn(4)
    net.norm.running_var = torch.rand(4) + 0.5
    return simam.attach(net, where="conv", e_lambda=0.02)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def by_hand(net: Net, images: Tensor) -> dict[str, Tensor]:
    """The gates of the network in evaluation mode, computed without its modules, in float64."""
    state = {key: tensor.double() for key, tensor in net.state_dict().items()}
    x = nnf.conv2d(images.double(), state["conv.weight"], state["conv.bias"])
    gates = {"conv": gate(x, 0.02)}
    x = x * gates["conv"]
    mean, variance = state["norm.running_mean"], state["norm.running_var"] + net.norm.eps
    x = (x - mean[:, None, None]) / variance.sqrt()[:, None, None]
    x = x * state["norm.weight"][:, None, None] + state["norm.bias"][:, None, None]
    return gates | {"simam": gate(x.clamp(min=0), 0.5, "leave_one_out")}


@pytest.mark.parametrize("training", [False, True])
def test_attention_maps_match_the_definition(
    training: bool, net: Net, images: Tensor, implementation: str
) -> None:
    maps, expected = attention_maps(net.train(training), images), by_hand(net, images)
    assert list(maps) == ["conv", "simam"]
    for path, found in maps.items():
        assert found.shape == (2, 4, 7, 6)
        # The inputs, up to 5, are rounded to float32 by the convolution and the norm.
        assert_close(found, expected[path], absolute=1e-5)
        assert not found.requires_grad


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "tensors": [*map(id, model.parameters()), *map(id, model.buffers())],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            {key: list(value) for key, value in vars(module).items() if key.endswith("hooks")}
            for module in model.modules()
        ],
        "options": [sorted(map(str, vars(module))) for module in model.modules()],
        "random": torch.get_rng_state(),
        "stance": torch._dynamo.eval_frame._stance.stance,
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


def mixed_modes(net: Net) -> Net:
    """Train mode, except for a frozen batch norm."""
    net.train().norm.eval()
    return net


@pytest.mark.parametrize("prepare", [nn.Module.train, nn.Module.eval, mixed_modes])
def test_attention_maps_leave_the_model_unchanged(prepare: Any, net: Net, images: Tensor) -> None:
    prepare(net)
    net.conv.weight.requires_grad_(False)
    net.simam.register_forward_pre_hook(lambda layer, args: None)
    before = snapshot(net)
    first = attention_maps(net, images)
    assert_unchanged(before, net)
    torch.testing.assert_close(attention_maps(net, images), first, rtol=0, atol=0)


def test_assert_unchanged_detects_a_forward_pass_in_training(net: Net, images: Tensor) -> None:
    before = snapshot(net)
    net(images)
    with pytest.raises(AssertionError):
        assert_unchanged(before, net)


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_attention_maps_leave_the_model_unchanged_if_the_pass_fails(
    at: str, net: Net, images: Tensor
) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("of the model")

    order = {"before": [Fails(), net], "between": [net, Fails(), net], "after": [net, Fails()]}
    model = nn.Sequential(*order[at]).train()
    before = snapshot(model)
    with pytest.raises(KeyError, match="of the model"):
        attention_maps(model, images)
    assert_unchanged(before, model)


class Observer(nn.Module):
    """Writes and resizes its buffers in every mode, as observers for quantisation do."""

    seen: Tensor
    count: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("count", self.seen)  # the same tensor under a second name
        self.register_buffer("largest", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.largest = x.amax((0, 2, 3))
        return x


def test_attention_maps_restore_buffers_written_in_evaluation_mode(
    net: Net, images: Tensor
) -> None:
    model = nn.Sequential(Observer(), net)
    before = snapshot(model)
    attention_maps(model, images)
    assert_unchanged(before, model)
    assert model[0].largest.numel() == 0
    model(images)
    assert model[0].seen == 1  # a plain forward pass does write


def test_attention_maps_set_modes_without_calling_train(images: Tensor) -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> "Frozen":
            raise RuntimeError("modes must be set one by one")

    attention_maps(Frozen(), images)


def test_attention_maps_use_the_paths_of_plan(images: Tensor) -> None:
    models = pytest.importorskip("torchvision.models", reason="a real network")
    model = models.resnet18()
    planned = simam.plan(model)
    maps = attention_maps(simam.attach(model), torch.randn(1, 3, 64, 64))
    assert list(maps) == [insertion.path for insertion in planned]
    assert maps["layer1.0.conv2"].shape == (1, 64, 16, 16)
    assert maps["layer4.1.conv2"].shape == (1, 512, 2, 2)


def test_attention_maps_name_the_path_of_every_layer(images: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.simam = simam.SimAM()  # the network's own, under the name that attach uses

        def forward(self, x: Tensor) -> Tensor:
            return self.simam(x=self.conv(x))

    model = simam.attach(nn.Sequential(Block(), simam.SimAM()), where="0.conv")
    assert list(attention_maps(model, images)) == ["0.conv", "0.simam", "1"]
    assert list(attention_maps(simam.SimAM(), images)) == [""]


def test_attention_maps_number_repeated_calls(images: Tensor) -> None:
    layer = simam.SimAM(e_lambda=0.1)
    model = nn.Sequential(layer, nn.AvgPool2d(2), layer, nn.MaxPool2d(2), nn.Sequential(layer))
    maps = attention_maps(model, images)
    first = images.double() * gate(images, 0.1)
    second = nnf.avg_pool2d(first, 2)
    third = nnf.max_pool2d(second * gate(second, 0.1), 2)
    assert list(maps) == ["0", "0#2", "0#3"]
    for found, x in zip(maps.values(), (images, second, third), strict=True):
        assert_close(found, gate(x, 0.1), absolute=1e-6)  # x is rounded after each layer


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = simam.SimAM(), simam.SimAM()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) if x.shape[-1] > 4 else x


def test_attention_maps_leave_out_layers_that_are_not_called(images: Tensor) -> None:
    assert list(attention_maps(Unused(), images)) == ["used"]


def test_attention_maps_refuse_a_pass_that_calls_no_layer() -> None:
    message = "the forward pass of this Unused called none of its SimAM layers: used, unused"
    with pytest.raises(ValueError, match=f"^{message}$"):
        attention_maps(Unused(), torch.ones(1, 1, 4, 4))


def test_attention_maps_refuse_a_model_without_simam(images: Tensor) -> None:
    message = (
        "this Conv2d has no SimAM layer: insert SimAM with simam.attach(model). "
        "For a scripted, traced or exported model, pass the original model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attention_maps(nn.Conv2d(3, 3, 3), images)


def test_attention_maps_refuse_a_model_that_is_no_module(images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got function$"):
        attention_maps(gate, images)  # type: ignore[arg-type]


def test_attention_maps_respect_hooks_of_the_user(images: Tensor) -> None:
    layer = simam.SimAM(e_lambda=0.1)
    layer.register_forward_pre_hook(lambda layer, args: (args[0] ** 2,))
    (found,) = attention_maps(layer, images).values()
    assert_close(found, gate(images**2, 0.1))


def parallel(net: nn.Module) -> nn.Module:
    return nn.DataParallel(net, device_ids=[])


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    "wrap",
    [parallel, compiled, compiled_in_place, lambda net: parallel(compiled(net))],
    ids=["parallel", "compiled", "compiled in place", "both"],
)
def test_attention_maps_look_inside_wrapped_models(wrap: Any, net: Net, images: Tensor) -> None:
    expected = attention_maps(net.eval(), images)
    model = wrap(net)
    model(images)  # compiles; the compiled graph would ignore hooks that are added later
    torch.testing.assert_close(attention_maps(model, images), expected, rtol=0, atol=0)


def test_attention_maps_compile_nothing(net: Net, images: Tensor) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net.train().compile(backend=backend)
    net(images)
    compiled_before = len(graphs)
    assert compiled_before
    attention_maps(net, images)
    net(images)
    assert len(graphs) == compiled_before


def test_attention_maps_look_inside_compiled_submodules(net: Net, images: Tensor) -> None:
    expected = attention_maps(net, images)
    inside = compiled(net.eval())
    inside(images)
    maps = attention_maps(nn.Sequential(inside), images)
    assert list(maps) == ["0._orig_mod.conv", "0._orig_mod.simam"]
    for found, of_net in zip(maps.values(), expected.values(), strict=True):
        assert torch.equal(found, of_net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_attention_maps_keep_the_dtype(dtype: torch.dtype, images: Tensor) -> None:
    x = images.to(dtype)
    (found,) = attention_maps(simam.SimAM(e_lambda=0.1), x).values()
    assert found.dtype == dtype
    assert_close(found, gate(x, 0.1))


def test_attention_maps_keep_channels_last(images: Tensor) -> None:
    x = images.to(memory_format=torch.channels_last)
    (found,) = attention_maps(simam.SimAM(), x).values()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, gate(images, 1e-4))


def test_attention_maps_pass_lists_of_images_on(images: Tensor) -> None:
    class TakesList(Net):
        def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack(x))

    model = TakesList().eval()
    expected = gate(nnf.relu(model.norm(model.conv(images))), 0.5, "leave_one_out")
    assert_close(attention_maps(model, list(images))["simam"], expected, absolute=1e-5)
