"""The recipes, field by field, on the detectors and optimizers that are built from them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

for name in ("torchvision", "timm", "pycocotools"):
    pytest.importorskip(name)

from torch.utils.data import Dataset

from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.common.sampler import DistributedBatchSampler
from benchmarks.accuracy.detection.models import build
from benchmarks.accuracy.detection.recipes import RECIPES, Recipe
from benchmarks.accuracy.detection.trainer import Trainer
from simam import SimAM
from simam.messages import UserError
from tests.helpers.detection import tiny

PAPER = RECIPES["paper-coco"]
STEPS = 14786  # per epoch: COCO's train2017 has 118287 images, 117266 of them with objects
ONE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))


class RandomImages(Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        target = {"boxes": torch.tensor([[2.0, 3, 20, 25]]), "labels": torch.tensor([1])}
        return torch.rand(3, 32, 32), target


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(PAPER, 80)


def test_trainer_uses_sgd_of_the_paper(model: nn.Module) -> None:
    assert (PAPER.epochs, PAPER.batch_size) == (12, 8)
    trainer = Trainer(
        model, PAPER, ONE_PROCESS, RandomImages(8), DistributedBatchSampler(8, PAPER.batch_size, 0)
    )
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    (group,) = trainer.optimizer.param_groups  # norms and biases with the rest
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert {id(p) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.01 * 0.001),
        (250, 0.01 * (0.001 + 0.999 / 2)),
        (499, 0.01 * (0.001 + 0.999 * 499 / 500)),
        (500, 0.01),
        (8 * STEPS - 1, 0.01),
        (8 * STEPS, 0.001),
        (11 * STEPS - 1, 0.001),
        (11 * STEPS, 0.0001),
        (12 * STEPS - 1, 0.0001),
    ],
)
def test_learning_rate_of_the_paper(step: int, rate: float) -> None:
    assert PAPER.learning_rate(step, STEPS) == pytest.approx(rate, rel=1e-12)


def test_trainer_sets_the_learning_rate_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(model="fasterrcnn_resnet18_fpn", epochs=3, milestones=(1, 2), warmup_steps=3)
    batches = DistributedBatchSampler(8, 4, 0)  # 2 steps in an epoch
    trainer = Trainer(build(recipe, 1), recipe, ONE_PROCESS, RandomImages(8), batches)
    rates = []
    optimizer_step = trainer.optimizer.step

    def step() -> None:
        rates.extend(group["lr"] for group in trainer.optimizer.param_groups)
        optimizer_step()

    monkeypatch.setattr(trainer.optimizer, "step", step)
    for _ in range(recipe.epochs):
        trainer.epoch()
    warmup = [0.001, 0.001 + 0.999 / 3, 0.001 + 0.999 * 2 / 3, 1, 1, 1]
    decay = [1, 1, 0.1, 0.1, 0.01, 0.01]
    expected = [0.02 * a * b for a, b in zip(warmup, decay, strict=True)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_build_freezes_stem_and_first_stage_of_the_paper(model: nn.Module) -> None:
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert {"layer2", "layer3", "layer4"} <= trained
    assert not frozen & trained


def test_build_fixes_batch_norm_statistics_of_the_paper(model: nn.Module) -> None:
    model.train()
    norms = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    }
    assert len(norms) == 53  # exactly those of a ResNet-50
    assert all(name.startswith("backbone.body.") for name in norms)
    assert not any(norm.training for norm in norms.values())
    assert model.training
    assert model.backbone.body.layer4.training
    for name, norm in norms.items():
        trains = not name.startswith(("backbone.body.bn1", "backbone.body.layer1"))
        assert norm.weight.requires_grad == norm.bias.requires_grad == trains
    norm = model.backbone.body.layer2[0].bn1
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.randn(2, 128, 4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_build_uses_sizes_of_the_paper(model: nn.Module) -> None:
    assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    assert PAPER.flip == 0.5
    assert model.backbone.out_channels == 256
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.roi_heads.box_predictor.cls_score.out_features == 81


def test_build_attaches_simam_after_every_3x3_convolution(model: nn.Module) -> None:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SimAM)}
    depths = {1: 3, 2: 4, 3: 6, 4: 3}
    assert set(layers) == {
        f"backbone.body.layer{stage}.{block}.conv2.simam"
        for stage, depth in depths.items()
        for block in range(depth)
    }
    assert {layer.e_lambda for layer in layers.values()} == {0.1}
    plain = build(replace(PAPER, attention="none"), 80)
    assert not any(isinstance(m, SimAM) for m in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict())


def test_build_matches_torchvision() -> None:
    from torchvision.models import detection

    for name in ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"):
        with torch.device("meta"):
            theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=81)
            ours = build(replace(PAPER, model=name), 80)
        shapes, expected = (
            {key: tensor.shape for key, tensor in network.state_dict().items()}
            for network in (ours, theirs)
        )
        assert shapes == expected


@pytest.mark.parametrize("stages", range(5))
def test_build_freezes_stages(stages: int) -> None:
    with torch.device("meta"):
        body = build(tiny(frozen_stages=stages), 1).backbone.body
    frozen = {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad}
    order = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert frozen == set(order[: stages + 2] if stages else [])


def test_build_without_norm_eval_trains_batch_norm_statistics() -> None:
    model = build(tiny(), 1).train()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(("epochs", "milestones"), [(24, (16, 22)), (6, (4, 5.5)), (12, (8, 11))])
def test_override_of_epochs_scales_milestones(epochs: int, milestones: tuple[float, ...]) -> None:
    assert PAPER.override({"epochs": epochs}).milestones == pytest.approx(milestones)


def test_override_keeps_given_milestones() -> None:
    assert PAPER.override({"epochs": 24, "milestones": (20.0,)}).milestones == (20.0,)


def test_override_changes_only_given_fields() -> None:
    recipe = PAPER.override({"lr": 0.5})
    assert recipe == replace(PAPER, lr=0.5)
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "fasterrcnn_resnet20_fpn"}, "--model: expected one of fasterrcnn_resnet18_fpn"),
        ({"attention": "se"}, "--attention: expected one of simam, none, got se"),
        ({"epochs": 0}, "--epochs: expected 1 or more, got 0"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        ({"lr": 0.0}, "--lr: expected more than 0, got 0.0"),
        ({"lr": float("nan")}, "--lr: expected more than 0, got nan"),
        ({"momentum": 1.0}, "--momentum: expected at least 0 and less than 1, got 1.0"),
        ({"weight_decay": -1.0}, "--weight-decay: expected 0 or more, got -1.0"),
        ({"milestones": (0.0, 2.0)}, "--milestones: expected epochs greater than 0, got 0.0 2.0"),
        ({"warmup_steps": -1}, "--warmup-steps: expected 0 or more, got -1"),
        ({"warmup_factor": 2.0}, "--warmup-factor: expected 0 to 1, got 2.0"),
        ({"e_lambda": 0.0}, "--e-lambda: expected more than 0, got 0.0"),
        ({"min_size": 16}, "--min-size: expected 32 or more, got 16"),
        ({"max_size": 700}, r"--max-size: expected 800 \(--min-size\) or more, got 700"),
        ({"flip": 1.5}, "--flip: expected 0 to 1, got 1.5"),
        ({"frozen_stages": 5}, "--frozen-stages: expected 0 to 4, got 5"),
        ({"channels": 0}, "--channels: expected 1 or more, got 0"),
        ({"regions": 0}, "--regions: expected 1 or more, got 0"),
        ({"anchor_sizes": (8, 16)}, "--anchor-sizes: expected five sizes of 1 or more, got 8 16"),
    ],
)
def test_recipe_refuses_values_out_of_range(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        PAPER.override(changes)
