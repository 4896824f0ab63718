"""timm folds blocks by their own methods, and builds a network again from its name."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from simam import attach, attached, detach
from tests.helpers.borders import compare, needs, tool, train_norms

pytestmark = needs("timm", "huggingface_hub", "safetensors")

Record = Callable[..., None]

# Networks in which no block is residual need where=.
FOLDABLE = {
    "fastvit_t8": None,
    "levit_128s": "stem.*.linear",
    "mobileone_s0": "*.conv_kxk.*.conv",
    "repghostnet_050": None,
    "repvgg_a0": "*.conv_kxk.conv",
    "repvit_m1": "*.token_mixer.conv.c",
    "tiny_vit_5m_224": None,
}


def network(name: str, where: str | None) -> nn.Module:
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name)
    for path, parameter in net.named_parameters():
        if path.endswith("gamma"):  # the weight of a branch, which is tiny in a fresh network
            nn.init.ones_(parameter)
    train_norms(net, torch.rand(2, 3, 224, 224))
    return attach(net, e_lambda=0.1, where=where)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("name", FOLDABLE)
@torch.no_grad()
def test_reparameterize_model_is_right_or_refused(name: str, inplace: bool, record: Record) -> None:
    from timm.utils import reparameterize_model

    net = network(name, FOLDABLE[name])
    hosts = attached(net).keys()
    x = torch.rand(1, 3, 224, 224)
    plain, expected = detach(copy.deepcopy(net)), net(x)
    outcome, folded = "refused clearly", net
    try:
        folded = reparameterize_model(net, inplace=inplace)
        outcome = "works"
    except RuntimeError as error:
        assert str(error).startswith("cannot fold")  # noqa: PT017
    assert (outcome == "works") is (name == "fastvit_t8")
    assert attached(folded).keys() == hosts
    differences = compare(folded(x), expected, plain(x))
    record(tool("timm"), "`reparameterize_model`", outcome, network=name, **differences)


@pytest.mark.parametrize("name", ["repvit_m1"])
@torch.no_grad()
def test_fuse_is_refused(name: str, record: Record) -> None:
    net = network(name, FOLDABLE[name])
    x = torch.rand(1, 3, 224, 224)
    plain, expected = detach(copy.deepcopy(net)), net(x)
    with pytest.raises(RuntimeError, match=r"^cannot fold"):
        net.fuse()
    differences = compare(net(x), expected, plain(x))
    record(tool("timm"), "`model.fuse()`", "refused clearly", network=name, **differences)


@torch.no_grad()
def test_save_for_hf_loses_attached_simam(tmp_path: Path, record: Record) -> None:
    import timm
    from timm.models import save_for_hf

    net = network("resnet18", None)
    x = torch.rand(1, 3, 64, 64)
    expected = net(x)
    save_for_hf(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert attached(loaded) == {}
    plain = loaded(x)
    attach(loaded, e_lambda=0.1)
    assert len(attached(loaded)) == 8
    record(
        tool("timm"),
        "`save_for_hf` and load",
        "works, with a note",
        network="resnet18",
        note="`attach` again after loading",
        **compare(loaded(x), expected, plain),
    )
