"""load_backbone: features of the detector, against those of the network that gave the weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("torchvision", "timm", "pycocotools"):
    pytest.importorskip(name)

import timm
import torchvision
from torch import Tensor, nn

from benchmarks.accuracy.detection.models import build, load_backbone
from benchmarks.accuracy.detection.recipes import Recipe
from simam import SimAM, attach
from simam.messages import UserError
from tests.helpers.authors_networks import filled, publish, publish_detector
from tests.helpers.detection import tiny

# In float64, since rounding errors grow over 50 layers.
IMAGES = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recipe(model: str = "resnet18", **changes: Any) -> Recipe:
    return tiny(model=f"fasterrcnn_{model}_fpn", **changes)


def features(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return list(model.backbone.body.double().eval()(IMAGES).values())


def stages(network: nn.Module) -> list[Tensor]:
    """The feature maps of the four stages of a classifier."""
    with torch.no_grad():
        network.double().eval()
        x = network.maxpool(network.bn1(network.conv1(IMAGES)).relu())
        feature_maps = []
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage(x)
            feature_maps.append(x)
        return feature_maps


@pytest.mark.parametrize(
    ("name", "write", "norm_eval"),  # every pair of values
    [
        ("resnet18", publish, True),
        ("resnet18", publish_detector, False),
        ("resnet50", publish, False),
        ("resnet50", publish_detector, True),
    ],
)
def test_load_backbone_reads_the_authors_files(
    name: str, write: Any, norm_eval: bool, tmp_path: Path
) -> None:
    network = filled(name)
    path = write(network, tmp_path / "authors.pth")
    chosen = recipe(name, norm_eval=norm_eval)
    model = build(chosen, 3)
    load_backbone(model, path, chosen)
    with torch.no_grad():
        expected = network.double().features(IMAGES)
    for ours, theirs in zip(features(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_load_backbone_keeps_lambda_of_the_recipe(tmp_path: Path) -> None:
    path = publish(filled("resnet18"), tmp_path / "authors.pth")
    chosen = recipe(e_lambda=0.01)
    model = build(chosen, 3)
    load_backbone(model, path, chosen)
    assert {m.e_lambda for m in model.modules() if isinstance(m, SimAM)} == {0.01}


def test_load_backbone_reads_training_checkpoint_with_simam(tmp_path: Path) -> None:
    network = attach(torchvision.models.resnet18(num_classes=10), e_lambda=0.1)
    path = tmp_path / "best.pth"
    torch.save({"state_dict": network.state_dict(), "optimizer": {}, "epoch": 3}, path)
    model = build(recipe(), 3)
    load_backbone(model, path, recipe())
    for ours, theirs in zip(features(model), stages(network), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("make", [torchvision.models.resnet18, timm.models.resnet18])
def test_load_backbone_reads_plain_classifier(make: Any, prefix: str, tmp_path: Path) -> None:
    network = make(num_classes=7)
    state = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": state}, path)
    chosen = recipe(attention="none")
    model = build(chosen, 3)
    load_backbone(model, path, chosen)
    for ours, theirs in zip(features(model), stages(network), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_load_backbone_reads_file_without_batch_counts(tmp_path: Path) -> None:
    network = torchvision.models.resnet18()
    state = {k: t for k, t in network.state_dict().items() if "num_batches_tracked" not in k}
    path = tmp_path / "old.pth"
    torch.save(state, path)
    chosen = recipe(attention="none")
    model = build(chosen, 3)
    load_backbone(model, path, chosen)
    for ours, theirs in zip(features(model), stages(network), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("write", [publish, publish_detector])
def test_load_backbone_refuses_simam_weights_for_plain_detector(write: Any, tmp_path: Path) -> None:
    path = write(filled("resnet18"), tmp_path / "authors.pth")
    chosen = recipe(attention="none")
    text = (
        f"{path} has the weights of a network with SimAM, and this detector has none: "
        "use --attention simam"
    )
    with pytest.raises(UserError, match=re.escape(text)):
        load_backbone(build(chosen, 3), path, chosen)


@pytest.mark.parametrize("attention", ["simam", "none"])
def test_load_backbone_refuses_another_network_and_changes_nothing(
    attention: str, tmp_path: Path
) -> None:
    path = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34().state_dict(), path)
    chosen = recipe(attention=attention)
    model = build(chosen, 3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text = f"{path} does not fit the backbone of fasterrcnn_resnet18_fpn, which has 120 tensors: "
    with pytest.raises(UserError, match=re.escape(text)) as raised:
        load_backbone(model, path, chosen)
    assert "unexpected: layer1.2.conv1.weight" in str(raised.value)
    assert "Give the weights of a resnet18" in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_load_backbone_refuses_authors_weights_of_another_network(tmp_path: Path) -> None:
    path = publish(filled("resnet18"), tmp_path / "authors.pth")
    with pytest.raises(UserError, match=f"{path} does not fit"):
        load_backbone(build(recipe("resnet34"), 3), path, recipe("resnet34"))


def test_load_backbone_refuses_unreadable_files(tmp_path: Path) -> None:
    model = build(recipe(), 3)
    with pytest.raises(UserError, match=r"cannot read .*gone.pth: No such file or directory"):
        load_backbone(model, tmp_path / "gone.pth", recipe())
    path = tmp_path / "text.pth"
    path.write_text("weights")
    with pytest.raises(UserError, match=r"text.pth is refused: .*expected one written by"):
        load_backbone(model, path, recipe())
