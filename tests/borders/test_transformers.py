"""transformers builds a network again from its configuration, which does not mention SimAM."""

from collections.abc import Callable
from pathlib import Path

import torch

from simam import attach, attached
from tests.helpers.borders import compare, needs, tool, train_norms

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
