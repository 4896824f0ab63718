"""What the tests of detection share: small sets in COCO's format, and detect.py itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.accuracy import detect
from benchmarks.accuracy.detection.coco import Split, read
from benchmarks.accuracy.detection.recipes import RECIPES, Recipe

# The shapes' recipe, so small that a step takes a fraction of a second.
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

Content = dict[str, list[dict[str, Any]]]
Capture = pytest.CaptureFixture[str]


def tiny(**changes: Any) -> Recipe:
    return RECIPES["shapes"].changed(TINY | changes)


def content() -> Content:
    """Two images, four objects; the ids of categories neither start at 1 nor are in order."""
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
    """An object that fills its box, as a polygon."""
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
    """Write a split; its images, which all are there, hold noise."""
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
    return detect.run(detect.parse("detect", [str(argument) for argument in arguments]))


def message(capsys: Capture, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What detect.py says of a mistake, after checking that it says nothing else."""
    monkeypatch.setattr("sys.argv", ["detect.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        detect.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.partition("detect.py: error: ")[2].strip()
