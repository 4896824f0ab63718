"""segmentation-models-pytorch builds a network again from its arguments."""

from collections.abc import Callable
from pathlib import Path

import torch

from simam import attach, attached
from tests.helpers.borders import compare, needs, tool, train_norms

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
