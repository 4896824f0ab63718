"""The networks of classification: their sizes, their attention and their initial weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("numpy", "timm", "torchvision"):
    pytest.importorskip(package, reason="the training scripts need the extra train")

import timm

import simam
from benchmarks.accuracy.classification import cifar, networks
from benchmarks.accuracy.classification.options import ATTENTION
from simam.messages import UserError

KINDS = {
    "se": "SEModule",
    "eca": "EcaModule",
    "cbam": "CbamModule",
    "gc": "GlobalContext",
    "simam": "SimAM",
    "simam-post-norm": "SimAM",
    "simam-branch": "SimAM",
}


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers, plus two per element of a batch norm."""
    total = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        match module:
            case nn.Conv2d():
                area = module.kernel_size[0] * module.kernel_size[1]
                total += out.numel() * module.in_channels // module.groups * area
            case nn.Linear():
                total += out.numel() * module.in_features
            case nn.BatchNorm2d():
                total += 2 * out.numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("name", "parameters", "billions"),
    [  # the paper's table
        ("resnet18", "11.69", "1.82"),
        ("resnet34", "21.80", "3.67"),
        ("resnet50", "25.56", "4.11"),
        ("resnet101", "44.55", "7.83"),
        ("resnext50_32x4d", "25.03", "4.26"),
        ("mobilenet_v2", "3.50", "0.31"),
    ],
)
@pytest.mark.parametrize("attention", ["none", "simam"])
def test_build_matches_size_and_cost_in_the_paper(
    name: str, parameters: str, billions: str, attention: str
) -> None:
    model = networks.build(name, 1000, attention)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == parameters
    assert f"{multiply_adds(model, torch.zeros(1, 3, 224, 224)) / 1e9:.2f}" == billions


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # from He et al., and Zagoruyko and Komodakis
        ("cifar_resnet20", "0.27"),
        ("cifar_resnet56", "0.85"),
        ("cifar_resnet110", "1.73"),
        ("cifar_preresnet110", "1.73"),
        ("cifar_wrn16_8", "10.96"),
        ("cifar_wrn28_10", "36.48"),
    ],
)
def test_build_cifar_networks_have_the_published_size(name: str, millions: str) -> None:
    model = networks.build(name, 10)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions


@pytest.mark.parametrize("name", cifar.NETWORKS)
def test_build_attaches_simam_after_second_or_depthwise_convolution(name: str) -> None:
    model = networks.build(name, 7, "simam", e_lambda=0.25)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, simam.SimAM)}
    if "mobilenet" in name:
        expected = [p for p, m in model.named_modules() if getattr(m, "groups", 1) > 1]
        assert len(expected) == 17
    else:
        expected = [p for p, _ in model.named_modules() if p.endswith(".conv2")]
        depth = int("".join(c for c in name.partition("_")[2].partition("_")[0] if c.isdigit()))
        assert len(expected) == (depth - 2 - 2 * ("wrn" in name)) // 2
    assert list(layers) == [f"{path}.simam" for path in expected]
    assert {layer.e_lambda for layer in layers.values()} == {0.25}


def by_hand(state: dict[str, Tensor], x: Tensor, *, pre: bool, depth: int) -> Tensor:
    """Compute a CIFAR network in evaluation mode from its weights."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, gain, shift = (
            state[f"{name}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + shift

    x = conv("stem.0", x)
    x = x if pre else norm("stem.1", x).relu()
    for stage in (1, 2, 3):
        for block in range(depth):
            path = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            if pre:
                active = norm(f"{path}.bn1", x).relu()
                y = conv(f"{path}.conv1", active, stride)
                y = conv(f"{path}.conv2", norm(f"{path}.bn2", y).relu())
                key = f"{path}.shortcut"
                x = y + (conv(key, active, stride) if f"{key}.weight" in state else x)
            else:
                y = norm(f"{path}.bn1", conv(f"{path}.conv1", x, stride)).relu()
                y = norm(f"{path}.bn2", conv(f"{path}.conv2", y))
                if stride == 2:
                    x = x[:, :, ::2, ::2]
                    x = torch.cat([x, torch.zeros_like(x)], 1)
                x = (x + y).relu()
    x = norm("last.0", x).relu() if pre else x
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_preresnet20"])
def test_cifar_networks_match_hand_computation(name: str) -> None:
    model = networks.build(name, 10).double()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    model(x)  # running statistics other than 0 and 1
    found = model.eval()(x)
    expected = by_hand(model.state_dict(), x, pre="pre" in name, depth=3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_cifar_mobilenet_v2_halves_maps_three_times() -> None:
    model = networks.build("cifar_mobilenet_v2", 10)
    x, sides = torch.zeros(1, 3, 32, 32), []
    for layer in model.eval().features:
        x = layer(x)
        sides.append(x.shape[-1])
    assert sides == [32] * 4 + [16] * 3 + [8] * 7 + [4] * 5


@pytest.mark.parametrize("kind", ["se", "eca", "cbam", "gc"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_build_puts_attention_where_timm_does(name: str, kind: str) -> None:
    ours = networks.build(f"timm/{name}", 5, kind)
    timms = timm.create_model(name, num_classes=5, block_args={"attn_layer": kind})
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(x), timms.eval()(x), rtol=0, atol=0)
    # torchvision's network of the same name has the layers at the same positions.
    other = networks.build(f"torchvision/{name}", 5, kind)
    norm = "bn2" if name == "resnet18" else "bn3"
    renamed = {
        key.replace(f".{norm}.", f".{norm}.0.").replace(".se.", f".{norm}.1."): tensor
        for key, tensor in ours.state_dict().items()
    }
    other.load_state_dict(renamed)
    torch.testing.assert_close(other.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar_resnet20", 9),
        ("cifar_preresnet20", 9),
        ("cifar_mobilenet_v2", 17),
        ("mobilenet_v2", 17),
        ("timm/mobilenetv2_100", 17),
        ("resnext50_32x4d", 16),
    ],
)
def test_build_puts_attention_into_every_block(name: str, count: int, kind: str) -> None:
    if (name, kind) == ("cifar_preresnet20", "simam-post-norm"):  # no norm follows the convolution
        with pytest.raises(UserError, match="no host for place='norm'"):
            networks.build(name, 10, kind)
        return
    model = networks.build(name, 10, kind)
    assert sum(type(m).__name__ == KINDS[kind] for m in model.modules()) == count


def test_build_puts_attention_after_norm_of_depthwise_convolution() -> None:
    seen = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[1:]))
            return x

    for name in ("torchvision/mobilenet_v2", "timm/mobilenetv2_100"):
        model = networks.build(name, 10, "se")
        for path, module in list(model.named_modules()):
            if type(module).__name__ == "SEModule":
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, Recorder())
        model.eval()(torch.zeros(1, 3, 64, 64))
    ours, timms = seen[:17], seen[17:]
    assert ours == timms
    assert ours[0] == (32, 32, 32)
    assert ours[-1] == (960, 2, 2)


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v2", "timm/resnet18"])
def test_build_draws_same_weights_for_every_attention(name: str) -> None:
    plain = networks.build(name, 10, seed=3)
    norms = len([m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)])
    for attention in ATTENTION:
        model = networks.build(name, 10, attention, seed=3)
        expected = list(plain.parameters())
        layers = [m for m in model.modules() if type(m).__name__ in KINDS.values()]
        own = {id(p) for layer in layers for p in layer.parameters()}
        found = [p for p in model.parameters() if id(p) not in own]
        assert len(found) == len(expected) > norms
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = networks.build(name, 10, seed=4)
    first, second = (next(iter(m.parameters())) for m in (plain, other))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "attention", "message"),
    [
        (
            "cifar_resnet21",
            "none",
            "unknown model 'cifar_resnet21'; expected one of cifar_resnet20",
        ),
        ("resnet19", "none", "unknown model 'resnet19'; close names: .*resnet18"),
        ("fasterrcnn_resnet50_fpn", "none", "does not classify single images"),
        ("efficientnet_b0", "se", "no attention of its own, efficientnet_b0 has no such block"),
        ("squeezenet1_1", "eca", "use --attention simam or none"),
        ("squeezenet1_1", "simam", "--attention simam: squeezenet1_1: "),
    ],
)
def test_build_refuses(name: str, attention: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        networks.build(name, 10, attention)
