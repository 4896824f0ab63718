"""segmentation-models-pytorch: SimAM in encoder and decoder, and networks that are built again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simam import attach, attached, plan
from tests.helpers.borders import compare, compare_by_hand, needs, tool, train_norms
from tests.helpers.by_hand import RESNET_18
from tests.helpers.docs import run_section

pytestmark = needs("segmentation_models_pytorch", "timm", "huggingface_hub")


@torch.no_grad()
def test_from_pretrained_needs_attach_again(tmp_path: Path, record: Callable[..., None]) -> None:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    net = train_norms(smp.Unet("resnet18", encoder_weights=None), torch.rand(4, 3, 64, 64))
    attach(net, e_lambda=0.1)
    hosts = attached(net).keys()
    x = torch.rand(1, 3, 64, 64)
    expected = net(x)
    net.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    assert attached(loaded) == {}
    plain = loaded(x)
    attach(loaded, e_lambda=0.1)
    assert attached(loaded).keys() == hosts
    record(
        tool("segmentation-models-pytorch"),
        "`save_pretrained`, `from_pretrained`",
        "works, with a note",
        network="U-Net with resnet18",
        note="`attach` again after loading",
        **compare(loaded(x), expected, plain),
    )


def test_encoder_and_decoder_equal_the_formula_by_hand(record: Callable[..., None]) -> None:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    net = run_section("frameworks.md", "segmentation-models-pytorch")["model"]
    train_norms(net, torch.rand(2, 3, 64, 64))
    hosts = [f"encoder.{host}" for host in RESNET_18]
    hosts += [f"decoder.blocks.{block}.conv2.0" for block in range(5)]
    assert list(attached(net)) == hosts
    plain = smp.Unet("resnet18", encoder_weights=None)
    x = torch.rand(1, 3, 64, 64)
    differences = compare_by_hand(net, plain, hosts, lambda net, x: net(x), x)
    record(
        tool("segmentation-models-pytorch"),
        "`attach` to the encoder, `where=` for the decoder",
        "works",
        network="U-Net with resnet18",
        **differences,
    )


@pytest.mark.parametrize("name", ["Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "Linknet"])
def test_plan_finds_the_blocks_of_the_encoder_alone(name: str, record: Callable[..., None]) -> None:
    import segmentation_models_pytorch as smp

    net = getattr(smp, name)("resnet18", encoder_weights=None)
    assert [insertion.path for insertion in plan(net)] == [f"encoder.{h}" for h in RESNET_18]
    case = "`plan` finds the encoder's blocks"
    record(tool("segmentation-models-pytorch"), case, "works", network=name)
