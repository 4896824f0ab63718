"""transformers builds a network again from its configuration, which does not mention SimAM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simam import attach, attached, plan
from tests.helpers.borders import compare, compare_by_hand, needs, tool, train_norms
from tests.helpers.docs import run_section

pytestmark = needs("transformers", "tokenizers")


@torch.no_grad()
def test_from_pretrained_needs_attach_again(tmp_path: Path, record: Callable[..., None]) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(depths=[2, 2], hidden_sizes=[16, 32], layer_type="basic")
    net = train_norms(ResNetForImageClassification(config), torch.rand(4, 3, 64, 64))
    attach(net, e_lambda=0.1)
    assert len(attached(net)) == 4
    x = torch.rand(1, 3, 64, 64)
    expected = net(x).logits
    net.save_pretrained(tmp_path)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert attached(loaded) == {}
    plain = loaded(x).logits
    attach(loaded, e_lambda=0.1)
    assert len(attached(loaded)) == 4
    record(
        tool("transformers"),
        "`save_pretrained`, `from_pretrained`",
        "works, with a note",
        network="ResNet",
        note="`attach` again after loading",
        **compare(loaded(x).logits, expected, plain),
    )


RESNET_HOSTS = [
    f"resnet.encoder.stages.{stage}.layers.{layer}.layer.1.convolution"
    for stage in (0, 1)
    for layer in (0, 1)
]
CONVNEXT_HOSTS = [f"convnextv2.encoder.stages.{stage}.layers.0.dwconv" for stage in range(4)]


def logits(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).logits


@pytest.fixture
def convnext() -> tuple[type[nn.Module], Any]:
    """The class of the page, and a small configuration."""
    from transformers import ConvNextV2Config

    config = ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])
    config.initializer_range = 0.2  # the branches of a fresh network add little
    return run_section("frameworks.md", "transformers")["SimAMConvNextV2"], config


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_attach_to_ResNet_equals_the_formula_by_hand(
    layer_type: str, record: Callable[..., None]
) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 16}
    config = ResNetConfig(**sizes, layer_type=layer_type)
    net = train_norms(ResNetForImageClassification(config), torch.rand(4, 3, 64, 64))
    attach(net, e_lambda=0.1)
    assert list(attached(net)) == RESNET_HOSTS
    plain = ResNetForImageClassification(config)
    differences = compare_by_hand(net, plain, RESNET_HOSTS, logits, torch.rand(1, 3, 64, 64))
    network = f"ResNet, {layer_type}"
    record(tool("transformers"), "`attach`", "works", network=network, **differences)


def test_class_that_attaches_equals_the_formula_by_hand(
    convnext: tuple[type[nn.Module], Any], record: Callable[..., None]
) -> None:
    from transformers import ConvNextV2ForImageClassification

    torch.manual_seed(0)
    kind, config = convnext
    net, plain = kind(config).eval(), ConvNextV2ForImageClassification(config)
    assert list(attached(net)) == CONVNEXT_HOSTS
    differences = compare_by_hand(net, plain, CONVNEXT_HOSTS, logits, torch.rand(1, 3, 64, 64))
    case = "a class that attaches"
    record(tool("transformers"), case, "works", network="ConvNeXtV2", **differences)


@pytest.mark.parametrize("place", ["norm", "branch"])
def test_ConvNeXtV2_has_no_host_at_other_places(
    place: str, convnext: tuple[type[nn.Module], Any]
) -> None:
    from transformers import ConvNextV2ForImageClassification

    with pytest.raises(ValueError, match=r"^found no place for SimAM"):
        plan(ConvNextV2ForImageClassification(convnext[1]), place=place)


@torch.no_grad()
def test_class_that_attaches_keeps_SimAM_in_from_pretrained(
    tmp_path: Path, convnext: tuple[type[nn.Module], Any], record: Callable[..., None]
) -> None:
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    kind, config = convnext
    net = kind(config).eval()
    net.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert list(attached(loaded)) == CONVNEXT_HOSTS
    plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert attached(plain) == {}
    x = torch.rand(1, 3, 64, 64)
    differences = compare(logits(loaded, x), logits(net, x), logits(plain, x))
    case = "`from_pretrained` of a class that attaches"
    record(tool("transformers"), case, "works", network="ConvNeXtV2", **differences)
