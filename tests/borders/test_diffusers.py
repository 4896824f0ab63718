"""diffusers: SimAM in the residual blocks of a UNet."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from simam import attach, attached, plan
from tests.helpers.borders import compare, compare_by_hand, needs, tool
from tests.helpers.docs import run_section

pytestmark = needs("diffusers", "huggingface_hub")

HOSTS = [
    "down_blocks.0.resnets.0.conv2",
    "down_blocks.0.resnets.1.conv2",
    "down_blocks.1.resnets.0.conv2",
    "down_blocks.1.resnets.1.conv2",
    "up_blocks.0.resnets.0.conv2",
    "up_blocks.0.resnets.1.conv2",
    "up_blocks.0.resnets.2.conv2",
    "up_blocks.1.resnets.0.conv2",
    "up_blocks.1.resnets.1.conv2",
    "up_blocks.1.resnets.2.conv2",
    "mid_block.resnets.0.conv2",
    "mid_block.resnets.1.conv2",
]


def run(net: nn.Module, x: Tensor) -> Tensor:
    return net(x, timestep=7).sample


def test_where_equals_the_formula_by_hand(record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    net = run_section("frameworks.md", "diffusers")["model"].eval()
    assert list(attached(net)) == HOSTS
    plain = type(net).from_config(net.config)
    differences = compare_by_hand(net, plain, HOSTS, run, torch.randn(1, 3, 16, 16))
    case = '`attach(where="*.resnets.*.conv2")`'
    record(tool("diffusers"), case, "works", network="UNet2DModel", **differences)


def test_where_fits_UNet2DConditionModel(record: Callable[..., None]) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    options = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
    }
    net, plain = UNet2DConditionModel(**options).eval(), UNet2DConditionModel(**options)
    assert [insertion.path for insertion in plan(net)] == HOSTS
    attach(net, where="*.resnets.*.conv2", e_lambda=0.1)
    assert list(attached(net)) == HOSTS
    text = torch.randn(1, 3, 8, dtype=torch.float64)
    x = torch.randn(1, 4, 16, 16)
    differences = compare_by_hand(net, plain, HOSTS, lambda net, x: net(x, 7, text).sample, x)
    case = '`attach(where="*.resnets.*.conv2")`'
    record(tool("diffusers"), case, "works", network="UNet2DConditionModel", **differences)


def test_plan_without_where_finds_the_hosts(record: Callable[..., None]) -> None:
    net = run_section("frameworks.md", "diffusers")["model"]
    plain = type(net).from_config(net.config)
    glob = [insertion.path for insertion in plan(plain, where="*.resnets.*.conv2")]
    assert glob == HOSTS
    example = {"sample": torch.randn(1, 3, 16, 16), "timestep": 7}
    for planned in (plan(plain), plan(plain, example=example)):
        assert [insertion.path for insertion in planned] == glob
    record(tool("diffusers"), "`plan` without `where=`", "works", network="UNet2DModel")


@torch.no_grad()
def test_from_pretrained_needs_attach_again(tmp_path: Path, record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    net = run_section("frameworks.md", "diffusers")["model"].eval()
    x = torch.randn(1, 3, 16, 16)
    expected = run(net, x)
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path).eval()
    assert attached(loaded) == {}
    without = run(loaded, x)
    attach(loaded, where="*.resnets.*.conv2", e_lambda=0.1)
    record(
        tool("diffusers"),
        "`save_pretrained`, `from_pretrained`",
        "works, with a note",
        network="UNet2DModel",
        note="`attach` again after loading",
        **compare(run(loaded, x), expected, without),
    )
