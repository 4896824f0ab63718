"""The paper's recipes, number by number, by their effects: optimizer, schedule, crops."""

import pytest
import torch
from torch import nn

for package in ("numpy", "timm", "torchvision"):
    pytest.importorskip(package, reason="the training scripts need the extra train")

import numpy as np
from PIL import Image

from benchmarks.accuracy.classification.optimization import make_optimizer, make_scheduler
from benchmarks.accuracy.classification.options import parse
from benchmarks.accuracy.classification.recipes import RECIPES
from benchmarks.accuracy.classification.transforms import make_transforms

IMAGENET, CIFAR = 1_281_167, 50_000


def learning_rates(name: str, images: int, steps: list[int]) -> tuple[list[float], int]:
    """Learning rates at these steps, and the total number of steps."""
    options = parse(["--recipe", name])
    recipe = RECIPES[name]
    optimizer = make_optimizer(nn.Linear(2, 2), options.lr, options.weight_decay, options.momentum)
    total_steps = recipe.total_steps(images // options.batch_size)
    scheduler = make_scheduler(optimizer, recipe, total_steps)
    found = []
    for step in steps:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found, total_steps


def test_recipe_resnet_divides_rate_at_epochs_30_60_and_90_of_100() -> None:
    epoch = IMAGENET // 256
    steps = [0, 30 * epoch - 1, 30 * epoch, 60 * epoch - 1, 60 * epoch, 90 * epoch - 1, 90 * epoch]
    found, total_steps = learning_rates("paper-resnet", IMAGENET, steps)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])
    assert total_steps == 100 * epoch


def test_recipe_mobilenetv2_falls_from_0_05_along_a_cosine() -> None:
    length = 150 * (IMAGENET // 256)
    steps = [0, length // 3, length // 2, length]
    found, total_steps = learning_rates("paper-mobilenetv2", IMAGENET, steps)
    assert total_steps == length
    assert found == pytest.approx([0.05, 0.05 * 0.75, 0.025, 0.0], abs=1e-9)


def test_recipe_cifar_divides_rate_at_steps_32000_and_48000_of_64000() -> None:
    steps = [0, 31_999, 32_000, 47_999, 48_000, 63_999]
    found, total_steps = learning_rates("paper-cifar", CIFAR, steps)
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])
    assert total_steps == 64_000
    assert round(total_steps / (CIFAR / 128)) == 164  # the epochs in the documentation


def test_recipe_milestones_scale_with_epochs() -> None:
    recipe, rates = RECIPES["paper-cifar"], []
    total_steps = recipe.total_steps(156, epochs=10)
    assert total_steps == 1560
    optimizer = make_optimizer(nn.Linear(2, 2), 0.1, 0, 0.9)
    scheduler = make_scheduler(optimizer, recipe, total_steps)
    for step in (779, 780, 1169, 1170):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 1e-3])


@pytest.mark.parametrize(
    ("name", "batch", "decay", "e_lambda"),
    [
        ("paper-resnet", 256, 1e-4, 0.1),
        ("paper-mobilenetv2", 256, 4e-5, 0.1),
        ("paper-cifar", 128, 5e-4, 1e-4),
    ],
)
def test_recipe_optimizer_batch_size_and_lambda(
    name: str, batch: int, decay: float, e_lambda: float
) -> None:
    options = parse(["--recipe", name])
    assert (options.batch_size, options.e_lambda) == (batch, e_lambda)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = make_optimizer(model, options.lr, options.weight_decay, options.momentum)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups  # all parameters decay
    assert len(group["params"]) == 4
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, decay, False)


def gradient(width: int, height: int) -> Image.Image:
    """An image whose red grows to the right and whose green grows downwards."""
    x, y = np.meshgrid(np.linspace(1, 255, width), np.linspace(1, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


@pytest.mark.parametrize("name", ["paper-resnet", "paper-mobilenetv2"])
def test_recipe_crops_imagenet(name: str) -> None:
    recipe = RECIPES[name]
    train, test = make_transforms(recipe, 224, (0, 0, 0), (1, 1, 1))
    # The shorter side becomes 256, and the central 224 remain: from 1/16 to 15/16.
    seen = test(gradient(512, 256))
    assert seen.shape == (3, 224, 224)
    assert seen[1, 0, 0].item() == pytest.approx(1 / 16, abs=0.01)
    assert seen[1, -1, 0].item() == pytest.approx(15 / 16, abs=0.01)
    assert seen[0, 0, 0].item() == pytest.approx((256 - 112) / 512, abs=0.01)
    torch.manual_seed(0)
    image = gradient(400, 400)
    crops = [train(image) for _ in range(400)]
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
    assert all(crop[2].max() == 0 for crop in crops)  # colours do not change


def test_recipe_crops_cifar() -> None:
    recipe = RECIPES["paper-cifar"]
    train, test = make_transforms(recipe, 32, (0, 0, 0), (1, 1, 1))
    image = gradient(32, 32)
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


def test_recipe_normalizes_by_mean_and_deviation() -> None:
    for name in RECIPES:
        both = make_transforms(RECIPES[name], 32, (0.5, 0, 0), (0.25, 1, 1))
        for transform in both:
            white = Image.new("RGB", (48, 48), (255, 255, 255))
            middle = transform(white)[:, 16, 16]
            torch.testing.assert_close(middle, torch.tensor([2.0, 1.0, 1.0]))
