"""The recipes of the paper, number by number, on what they make: optimizer, schedule, crops."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="the scripts need timm")
Image = importlib.import_module("PIL.Image")
recipes = importlib.import_module("benchmarks.accuracy.classification.recipes")
transforms = importlib.import_module("benchmarks.accuracy.classification.transforms")
train = importlib.import_module("benchmarks.accuracy.train")

IMAGENET, CIFAR = 1_281_167, 50_000


def rates(name: str, images: int, at: list[int]) -> tuple[list[float], int]:
    """Learning rates of these steps, and the number of steps in all."""
    options = train.parse(["--recipe", name])
    recipe = recipes.RECIPES[name]
    sgd = recipes.optimizer(nn.Linear(2, 2), options.lr, options.weight_decay, options.momentum)
    steps = recipes.length(recipe, images // options.batch_size)
    schedule = recipes.schedule(sgd, recipe, steps)
    found = []
    for step in at:
        schedule.step_update(step)
        found.append(sgd.param_groups[0]["lr"])
    return found, steps


def test_resnets_divide_the_rate_at_epochs_30_60_and_90_of_100() -> None:
    epoch = IMAGENET // 256
    at = [0, 30 * epoch - 1, 30 * epoch, 60 * epoch - 1, 60 * epoch, 90 * epoch - 1, 90 * epoch]
    found, steps = rates("paper-resnet", IMAGENET, at)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])
    assert steps == 100 * epoch


def test_mobilenet_falls_from_a_twentieth_along_a_cosine() -> None:
    steps = 150 * (IMAGENET // 256)
    at = [0, steps // 3, steps // 2, steps]
    found, total = rates("paper-mobilenetv2", IMAGENET, at)
    assert total == steps
    assert found == pytest.approx([0.05, 0.05 * 0.75, 0.025, 0.0], abs=1e-9)


def test_cifar_divides_the_rate_at_steps_32000_and_48000_of_64000() -> None:
    at = [0, 31_999, 32_000, 47_999, 48_000, 63_999]
    found, steps = rates("paper-cifar", CIFAR, at)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert steps == 64_000
    assert round(steps / (CIFAR / 128)) == 164  # the epochs of the table


def test_milestones_keep_their_share_of_other_epochs() -> None:
    recipe, rates = recipes.RECIPES["paper-cifar"], []
    steps = recipes.length(recipe, 156, epochs=10)
    assert steps == 1560
    sgd = recipes.optimizer(nn.Linear(2, 2), 0.1, 0, 0.9)
    schedule = recipes.schedule(sgd, recipe, steps)
    for step in (779, 780, 1169, 1170):
        schedule.step_update(step)
        rates.append(sgd.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-3])


@pytest.mark.parametrize(
    ("name", "batch", "decay", "e_lambda"),
    [
        ("paper-resnet", 256, 1e-4, 0.1),
        ("paper-mobilenetv2", 256, 4e-5, 0.1),
        ("paper-cifar", 128, 5e-4, 1e-4),
    ],
)
def test_optimizer_batch_and_lambda(name: str, batch: int, decay: float, e_lambda: float) -> None:
    options = train.parse(["--recipe", name])
    assert (options.batch_size, options.e_lambda) == (batch, e_lambda)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    sgd = recipes.optimizer(model, options.lr, options.weight_decay, options.momentum)
    assert type(sgd) is torch.optim.SGD
    (group,) = sgd.param_groups  # no parameter is spared the decay
    assert len(group["params"]) == 4
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, decay, False)


def picture(width: int, height: int) -> Any:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(1, 255, width), np.linspace(1, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


@pytest.mark.parametrize("name", ["paper-resnet", "paper-mobilenetv2"])
def test_imagenet_crops(name: str) -> None:
    recipe = recipes.RECIPES[name]
    train, test = transforms.transforms(recipe, 224, (0, 0, 0), (1, 1, 1))
    # The short side becomes 256, of which the middle 224 are seen: from 1/16 to 15/16.
    seen = test(picture(512, 256))
    assert seen.shape == (3, 224, 224)
    assert seen[1, 0, 0].item() == pytest.approx(1 / 16, abs=0.01)
    assert seen[1, -1, 0].item() == pytest.approx(15 / 16, abs=0.01)
    assert seen[0, 0, 0].item() == pytest.approx((256 - 112) / 512, abs=0.01)
    torch.manual_seed(0)
    crops = [train(picture(400, 400)) for _ in range(400)]
    assert {crop.shape for crop in crops} == {(3, 224, 224)}
    flipped = [(crop[0, 0, -1] < crop[0, 0, 0]).item() for crop in crops]
    assert 160 < sum(flipped) < 240
    spans = [[(crop[c].max() - crop[c].min()).item() for c in (0, 1)] for crop in crops]
    areas = [width * height for width, height in spans]
    shapes = [width / height for width, height in spans]
    assert 0.07 < min(areas) < 0.15  # from 8 % of the image
    assert 0.85 < max(areas) <= 1  # to all of it
    assert 0.72 < min(shapes) < 0.8  # from 3:4
    assert 1.25 < max(shapes) < 1.38  # to 4:3
    assert all(crop[2].max() == 0 for crop in crops)  # colours are left alone


def test_cifar_crops() -> None:
    recipe = recipes.RECIPES["paper-cifar"]
    train, test = transforms.transforms(recipe, 32, (0, 0, 0), (1, 1, 1))
    image = picture(32, 32)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    torch.testing.assert_close(test(image) * 255, whole.float())
    padded = nn.functional.pad(whole, (4, 4, 4, 4))
    windows = {}
    for flip in (False, True):
        for top in range(9):
            for left in range(9):
                window = padded[:, top : top + 32, left : left + 32]
                window = window.flip(2) if flip else window
                windows[window.numpy().tobytes()] = (flip, top, left)
    torch.manual_seed(0)
    crops = [(train(image) * 255).round().to(torch.uint8) for _ in range(2000)]
    found = [windows[crop.numpy().tobytes()] for crop in crops]
    assert len(set(found)) == 2 * 9 * 9


def test_mean_and_deviation() -> None:
    for name in recipes.RECIPES:
        both = transforms.transforms(recipes.RECIPES[name], 32, (0.5, 0, 0), (0.25, 1, 1))
        for transform in both:
            white = Image.new("RGB", (48, 48), (255, 255, 255))
            middle = transform(white)[:, 16, 16]
            torch.testing.assert_close(middle, torch.tensor([2.0, 1.0, 1.0]))
