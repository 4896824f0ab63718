"""Shared by the tests of detection: small data sets in COCO's format, and calls of detect.py."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import simam
from benchmarks.accuracy import detect
from benchmarks.accuracy.common import log
from benchmarks.accuracy.detection import drawing, training
from benchmarks.accuracy.detection.coco import Content, Split, read
from benchmarks.accuracy.detection.options import PROG, parse
from benchmarks.accuracy.detection.recipes import RECIPES, Recipe

# Changes to the recipe "shapes" with which a step takes a fraction of a second.
TINY = {
    "min_size": 32,
    "max_size": 48,
    "channels": 8,
    "regions": 8,
    "batch_size": 4,
    "lr": 0.02,
    "warmup_steps": 2,
}
TINY_OPTIONS = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", str(v))]

# Of child processes: the modules of this checkout and the simam that is tested, on one thread.
ROOTS = [str(Path(module.__file__).parents[n]) for n, module in ((2, detect), (1, simam))]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS), "OMP_NUM_THREADS": "1"}

Capture = pytest.CaptureFixture[str]


def tiny(**overrides: Any) -> Recipe:
    return RECIPES["shapes"].override(TINY | overrides)


class NarrowResNet(ResNet):
    """torchvision's ResNet-18 with an eighth of the channels behind the stem."""

    def __init__(self, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)
        self.fc = nn.Linear(512 // 8, 1000)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> Any:
        return super()._make_layer(block, planes // 8, *arguments, **options)


@contextmanager
def narrow_backbones() -> Iterator[None]:
    """Replace ResNet-18, the backbone of the recipe "shapes", by `NarrowResNet`."""

    def get_model(name: str, *, weights: None, norm_layer: Callable[..., nn.Module]) -> nn.Module:
        assert name == "resnet18"
        return NarrowResNet(norm_layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "get_model", get_model)
        yield


def skip_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no PNG files, for tests that do not look at them."""
    monkeypatch.setattr(drawing, "draw", lambda *arguments: None)
    monkeypatch.setattr(log, "plot", lambda *arguments: None)


def content() -> Content:
    """Three images and four objects; category ids neither start at 1 nor are sorted."""
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 50},
            {"id": 8, "file_name": "empty.png", "width": 20, "height": 20},
        ],
        "categories": [
            {"id": 90, "name": "tree"},
            {"id": 7, "name": "house"},
            {"id": 13, "name": "road"},
        ],
        "annotations": [
            annotation(0, 5, 90, [2, 3, 10, 8]),
            annotation(21, 5, 7, [20.5, 10, 12, 15]),
            annotation(22, 3, 13, [0, 0, 20, 9]),
            annotation(23, 3, 7, [4, 20, 8, 16]),
        ],
    }


def annotation(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    """An object whose mask, a polygon, fills its box."""
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }


def store(root: Path, written: Content | str, split: str = "val") -> Path:
    """Write a split; the images contain noise."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for image in content()["images"]:
        noise = random.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / split / image["file_name"])
    text = written if isinstance(written, str) else json.dumps(written)
    (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root


def stored(root: Path, written: Content, *, masks: bool = True) -> Split:
    return read(store(root, written), "val", masks=masks)


def run(*arguments: object) -> Any:
    """Train or evaluate with these options; returns the metrics."""
    return training.run(parse([str(argument) for argument in arguments]))


def error_message(capsys: Capture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run detect.py with a user error; return its message, which must be the only output."""
    monkeypatch.setattr("sys.argv", [PROG, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        detect.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.partition(f"{PROG}: error: ")[2].strip()
