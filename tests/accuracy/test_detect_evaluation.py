"""COCO's figures, against an average precision computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for name in ("torchvision", "timm", "pycocotools"):
    pytest.importorskip(name)

from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.detection import drawing, shapes
from benchmarks.accuracy.detection.coco import Split, read
from benchmarks.accuracy.detection.dataset import Examples
from benchmarks.accuracy.detection.evaluation import NAMES, detect, in_coco_format, score, table
from benchmarks.accuracy.detection.models import build
from tests.helpers.detection import annotation, content, stored, tiny

HERE = DistributedContext(0, 1, torch.device("cpu"))
Targets = dict[int, dict[str, Tensor]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, {"val": 12})
    return read(folder, "val", masks=True)


def targets(split: Split) -> Targets:
    """What there is to find, by the ids of the images, as the detector would say it."""
    examples = Examples(split, masks=True, flip=0)
    return {
        image["id"]: examples[i][1] | {"masks": examples[i][1]["masks"][:, None].float()}
        for i, image in enumerate(examples.images)
    }


def perfect(split: Split) -> list[dict[str, Any]]:
    found = []
    for number, target in targets(split).items():
        result = target | {"scores": torch.ones(len(target["labels"]))}
        found += in_coco_format(result, number, list(split.categories))
    return found


def test_perfect_detections_score_one(split: Split) -> None:
    figures = score(split, perfect(split), masks=True)
    assert list(figures) == ["box", "mask"]
    for found in figures.values():
        assert tuple(found) == NAMES
        for name in ("AP", "AP50", "AP75", "APs", "APm", "AR100", "ARs", "ARm"):
            assert found[name] == pytest.approx(1, abs=1e-12)
        assert found["AR1"] < found["AR10"]  # one detection is not enough for several shapes
        assert found["APl"] is None  # the shapes are small
        assert found["ARl"] is None


def test_nothing_found_scores_zero(split: Split) -> None:
    for found in score(split, [], masks=True).values():
        assert all(value == 0 for value in found.values() if value is not None)
        assert found["AP"] == 0


def test_boxes_alone(split: Split) -> None:
    assert list(score(split, perfect(split), masks=False)) == ["box"]


def noisy(split: Split, seed: int) -> list[dict[str, Any]]:
    """Detections that are moved, of the wrong category, missing, double or of nothing."""
    random = np.random.default_rng(seed)
    found = []
    for number, target in targets(split).items():
        boxes, labels, masks = [], [], []
        for box, label, mask in zip(
            target["boxes"].tolist(), target["labels"].tolist(), target["masks"], strict=True
        ):
            for _ in range(random.choice([0, 1, 1, 1, 2])):
                dx, dy = random.integers(-5, 6, 2)
                labels.append(label if random.random() < 0.8 else int(random.integers(1, 4)))
                boxes.append([box[0] + dx, box[1] + dy, box[2] + dx / 2, box[3] + dy / 2])
                masks.append(torch.roll(mask, (int(dy), int(dx)), (1, 2)))
        if random.random() < 0.5:
            boxes.append([1, 2, 30, 40])
            labels.append(int(random.integers(1, 4)))
            masks.append(torch.zeros_like(target["masks"][0]).index_fill_(1, torch.arange(9), 1))
        result = {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels),
            "scores": torch.tensor(random.random(len(labels))),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 1, 120, 160),
        }
        found += in_coco_format(result, number, list(split.categories))
    return found


def box_overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["bbox"], b["bbox"]
    width = min(ax + aw, bx + bw) - max(ax, bx)
    height = min(ay + ah, by + bh) - max(ay, by)
    both = max(width, 0) * max(height, 0)
    return both / (aw * ah + bw * bh - both)


def mask_overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    from pycocotools import mask as rle

    first, second = (rle.decode(x["segmentation"]).astype(bool) for x in (a, b))
    return (first & second).sum() / (first | second).sum()


def average_precision(
    split: Split, found: list[dict[str, Any]], overlap: Any, least: float
) -> float:
    """The mean over categories of the precision at 101 recalls, step by step."""
    means = []
    for category in split.categories:
        there = [a for a in split.content["annotations"] if a["category_id"] == category]
        ours = [d for d in found if d["category_id"] == category]
        taken: set[int] = set()
        hits = []
        for detection in sorted(ours, key=lambda d: -d["score"]):
            free = [
                (overlap(detection, a), a["id"])
                for a in there
                if a["image_id"] == detection["image_id"] and a["id"] not in taken
            ]
            best, number = max(free, default=(0.0, 0))
            hits.append(best >= least)
            if hits[-1]:
                taken.add(number)
        right = np.cumsum(hits)
        recalls, precisions = right / len(there), right / np.arange(1, len(hits) + 1)
        means.append(
            np.mean(
                [
                    max((p for r, p in zip(recalls, precisions, strict=True) if r >= x), default=0)
                    for x in np.linspace(0, 1, 101)
                ]
            )
        )
    return float(np.mean(means))


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_computed_by_hand(split: Split, seed: int) -> None:
    found = noisy(split, seed)
    figures = score(split, found, masks=True)
    for kind, overlap in (("box", box_overlap), ("mask", mask_overlap)):
        by_hand = {
            t: average_precision(split, found, overlap, t) for t in np.linspace(0.5, 0.95, 10)
        }
        assert 0.1 < by_hand[0.5] < 0.9
        assert figures[kind]["AP50"] == pytest.approx(by_hand[0.5], abs=1e-9)
        assert figures[kind]["AP"] == pytest.approx(np.mean(list(by_hand.values())), abs=1e-9)
    assert figures["box"]["AP50"] != figures["mask"]["AP50"]


def test_masks_are_sorted_by_their_own_area(tmp_path: Path) -> None:
    # A mask of 100 pixels is small; its box, with 40 x 40, is not.
    from pycocotools import mask as rle

    mask = np.zeros((50, 50), np.uint8)
    mask[0, :], mask[:, 0] = 1, 1
    mask[41:], mask[:, 41:] = 0, 0
    code = rle.encode(np.asfortranarray(mask))
    written = {
        "images": [{"id": 1, "file_name": "a.png", "width": 50, "height": 50}],
        "categories": [{"id": 1, "name": "corner"}],
        "annotations": [
            annotation(1, 1, 1, [0, 0, 41, 41])
            | {"area": 81, "segmentation": code | {"counts": code["counts"].decode()}}
        ],
    }
    split = stored(tmp_path, written)
    wrong = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [0, 0, 41, 41]}
    elsewhere = rle.encode(np.asfortranarray(np.roll(mask, 5, (0, 1))))
    right = wrong | {"score": 0.5, "segmentation": code}
    figures = score(split, [wrong | {"segmentation": elsewhere}, right], masks=True)
    # The wrong one is small, too, and counts against what is found among the small.
    assert figures["mask"]["APs"] == pytest.approx(0.5)


class Oracle(nn.Module):
    """Finds everything; knows images by their sizes."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.known = targets(split)
        self.sizes = {(i["height"], i["width"]): i["id"] for i in split.content["images"]}
        self.seen: list[int] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        assert not self.training
        number = self.sizes[tuple(image.shape[1:])]
        self.seen.append(number)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        result = self.known.get(number, nothing)
        return [result | {"scores": torch.ones(len(result["labels"]))}]


def test_labels_become_the_ids_of_categories_again(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    model = Oracle(split)
    found = detect(model, split, HERE)
    assert model.seen == [5, 3, 8]  # the image without objects, too
    assert {d["category_id"] for d in found} == {7, 13, 90}
    for figures in score(split, found, masks=True).values():
        assert figures["AP"] == pytest.approx(1)
    labels = dict(zip(split.categories, [90, 7, 13], strict=True))
    mixed = [d | {"category_id": labels[d["category_id"]]} for d in found]
    assert score(split, mixed, masks=False)["box"]["AP50"] < 0.5


def test_two_processes_see_each_image_once(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    models = []
    for rank in range(2):
        models.append(Oracle(split))
        alone = DistributedContext(rank, 2, torch.device("cpu"))
        with pytest.raises(ValueError, match="Default process group"):  # there is none to gather in
            detect(models[-1], split, alone)
    assert [model.seen for model in models] == [[5, 8], [3]]


def test_a_model_in_training_trains_on(split: Split) -> None:
    model = build(tiny(), 3).train()
    detect(model, split, HERE)
    assert all(module.training for module in model.modules())


class WholeImage(nn.Module):
    """In the place of the heads: finds the whole of what it is given."""

    def forward(self, features: Any, proposals: Any, sizes: Any, targets: Any = None) -> Any:
        found = [
            {
                "boxes": torch.tensor([[0.0, 0, width, height]]),
                "labels": torch.tensor([2]),
                "scores": torch.tensor([0.5]),
                "masks": torch.ones(1, 1, 28, 28),
            }
            for height, width in sizes
        ]
        return found, {}


def test_detections_are_in_the_pixels_of_the_file(tmp_path: Path) -> None:
    from pycocotools import mask as rle

    split = stored(tmp_path, content())
    model = build(tiny(min_size=64, max_size=100), 3)
    model.roi_heads = WholeImage()
    for found, (width, height) in zip(
        detect(model, split, HERE), [(40, 30), (20, 50), (20, 20)], strict=True
    ):
        assert found["bbox"] == pytest.approx([0, 0, width, height], abs=1e-4)
        assert found["category_id"] == 13
        mask = rle.decode(found["segmentation"])
        assert mask.shape == (height, width)
        assert mask[1:-1, 1:-1].all()


def test_the_table_has_every_figure(split: Split) -> None:
    lines = table(score(split, perfect(split), masks=True)).splitlines()
    assert lines[0].split() == list(NAMES)
    for line, kind in zip(lines[1:], ("box", "mask"), strict=True):
        cells = line.split()
        assert cells[:2] == [kind, "1.000"]
        assert len(cells) == 13
        assert cells[1 + NAMES.index("APl")] == "-"


def test_the_picture_shows_what_was_found(split: Split, tmp_path: Path) -> None:
    sure, empty = tmp_path / "sure.png", tmp_path / "empty.png"
    drawing.draw(split, perfect(split), sure)
    drawing.draw(split, [d | {"score": 0.4} for d in perfect(split)], empty)
    with Image.open(sure) as a, Image.open(empty) as b:
        assert a.size == b.size
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() > 1


def test_a_picture_of_few_images(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    drawing.draw(split, [], tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
