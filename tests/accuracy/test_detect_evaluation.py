"""detect and score: COCO's metrics, against an average precision computed by hand."""

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
from benchmarks.accuracy.detection.dataset import TrainingDataset
from benchmarks.accuracy.detection.evaluation import (
    METRICS,
    detect,
    metrics_table,
    score,
    to_coco_format,
)
from benchmarks.accuracy.detection.models import build
from tests.helpers.detection import annotation, content, stored, tiny

ONE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))
Targets = dict[int, dict[str, Tensor]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, {"val": 12})
    return read(folder, "val", masks=True)


def targets(split: Split) -> Targets:
    """The ground truth by image id, in the form of a detector's output."""
    examples = TrainingDataset(split, masks=True, flip=0)
    return {
        image["id"]: examples[i][1] | {"masks": examples[i][1]["masks"][:, None].float()}
        for i, image in enumerate(examples.images)
    }


def perfect(split: Split) -> list[dict[str, Any]]:
    detections = []
    for image_id, target in targets(split).items():
        output = target | {"scores": torch.ones(len(target["labels"]))}
        detections += to_coco_format(output, image_id, list(split.categories))
    return detections


def test_score_of_perfect_detections_is_one(split: Split) -> None:
    metrics = score(split, perfect(split), masks=True)
    assert list(metrics) == ["box", "mask"]
    for values in metrics.values():
        assert tuple(values) == METRICS
        for name in ("AP", "AP50", "AP75", "APs", "APm", "AR100", "ARs", "ARm"):
            assert values[name] == pytest.approx(1, abs=1e-12)
        assert values["AR1"] < values["AR10"]  # one detection per image misses some shapes
        assert values["APl"] is None  # no shape is large
        assert values["ARl"] is None


def test_score_without_detections_is_zero(split: Split) -> None:
    for values in score(split, [], masks=True).values():
        assert all(value == 0 for value in values.values() if value is not None)
        assert values["AP"] == 0


def test_score_without_masks_has_boxes_only(split: Split) -> None:
    assert list(score(split, perfect(split), masks=False)) == ["box"]


def noisy(split: Split, seed: int) -> list[dict[str, Any]]:
    """Detections that are shifted, misclassified, missing, duplicated or spurious."""
    random = np.random.default_rng(seed)
    detections = []
    for image_id, target in targets(split).items():
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
        output = {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels),
            "scores": torch.tensor(random.random(len(labels))),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 1, 120, 160),
        }
        detections += to_coco_format(output, image_id, list(split.categories))
    return detections


def box_overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["bbox"], b["bbox"]
    width = min(ax + aw, bx + bw) - max(ax, bx)
    height = min(ay + ah, by + bh) - max(ay, by)
    intersection = max(width, 0) * max(height, 0)
    return intersection / (aw * ah + bw * bh - intersection)


def mask_overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    from pycocotools import mask as rle

    first, second = (rle.decode(x["segmentation"]).astype(bool) for x in (a, b))
    return (first & second).sum() / (first | second).sum()


def average_precision(
    split: Split, detections: list[dict[str, Any]], overlap: Any, threshold: float
) -> float:
    """The mean over categories of the precision at 101 recalls, by plain loops."""
    means = []
    for category in split.categories:
        objects = [a for a in split.content["annotations"] if a["category_id"] == category]
        candidates = [d for d in detections if d["category_id"] == category]
        matched: set[int] = set()
        hits = []
        for detection in sorted(candidates, key=lambda d: -d["score"]):
            overlaps = [
                (overlap(detection, a), a["id"])
                for a in objects
                if a["image_id"] == detection["image_id"] and a["id"] not in matched
            ]
            best, number = max(overlaps, default=(0.0, 0))
            hits.append(best >= threshold)
            if hits[-1]:
                matched.add(number)
        correct = np.cumsum(hits)
        recalls, precisions = correct / len(objects), correct / np.arange(1, len(hits) + 1)
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
def test_score_matches_average_precision_by_hand(split: Split, seed: int) -> None:
    detections = noisy(split, seed)
    metrics = score(split, detections, masks=True)
    for kind, overlap in (("box", box_overlap), ("mask", mask_overlap)):
        by_hand = {
            threshold: average_precision(split, detections, overlap, threshold)
            for threshold in np.linspace(0.5, 0.95, 10)
        }
        assert 0.1 < by_hand[0.5] < 0.9
        assert metrics[kind]["AP50"] == pytest.approx(by_hand[0.5], abs=1e-9)
        assert metrics[kind]["AP"] == pytest.approx(np.mean(list(by_hand.values())), abs=1e-9)
    assert metrics["box"]["AP50"] != metrics["mask"]["AP50"]


def test_score_sorts_masks_by_the_area_of_the_mask(tmp_path: Path) -> None:
    # The mask covers 81 pixels, which is small; its box, of 41 x 41, is medium.
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
    metrics = score(split, [wrong | {"segmentation": elsewhere}, right], masks=True)
    # The wrong detection is small, too, and counts as a false positive among small objects.
    assert metrics["mask"]["APs"] == pytest.approx(0.5)


class Oracle(nn.Module):
    """Detects every object; identifies an image by its size."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.targets = targets(split)
        self.ids = {(i["height"], i["width"]): i["id"] for i in split.content["images"]}
        self.seen: list[int] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        (image,) = images
        assert not self.training
        image_id = self.ids[tuple(image.shape[1:])]
        self.seen.append(image_id)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        output = self.targets.get(image_id, nothing)
        return [output | {"scores": torch.ones(len(output["labels"]))}]


def test_detect_converts_labels_to_category_ids(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    model = Oracle(split)
    detections = detect(model, split, ONE_PROCESS)
    assert model.seen == [5, 3, 8]  # the image without objects, too
    assert {d["category_id"] for d in detections} == {7, 13, 90}
    for values in score(split, detections, masks=True).values():
        assert values["AP"] == pytest.approx(1)
    permuted = dict(zip(split.categories, [90, 7, 13], strict=True))
    wrong = [d | {"category_id": permuted[d["category_id"]]} for d in detections]
    assert score(split, wrong, masks=False)["box"]["AP50"] < 0.5


def test_detect_splits_images_between_processes(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    models = []
    for rank in range(2):
        models.append(Oracle(split))
        one_of_two = DistributedContext(rank, 2, torch.device("cpu"))
        # Gathering fails, since no process group exists here.
        with pytest.raises(ValueError, match="Default process group"):
            detect(models[-1], split, one_of_two)
    assert [model.seen for model in models] == [[5, 8], [3]]


def test_detect_restores_training_mode(split: Split) -> None:
    model = build(tiny(), 3).train()
    detect(model, split, ONE_PROCESS)
    assert all(module.training for module in model.modules())


class WholeImage(nn.Module):
    """Replaces the heads: detects one object that covers the whole image."""

    def forward(self, features: Any, proposals: Any, sizes: Any, targets: Any = None) -> Any:
        outputs = [
            {
                "boxes": torch.tensor([[0.0, 0, width, height]]),
                "labels": torch.tensor([2]),
                "scores": torch.tensor([0.5]),
                "masks": torch.ones(1, 1, 28, 28),
            }
            for height, width in sizes
        ]
        return outputs, {}


def test_detect_returns_pixels_of_the_image_file(tmp_path: Path) -> None:
    from pycocotools import mask as rle

    split = stored(tmp_path, content())
    model = build(tiny(min_size=64, max_size=100), 3)
    model.roi_heads = WholeImage()
    for detection, (width, height) in zip(
        detect(model, split, ONE_PROCESS), [(40, 30), (20, 50), (20, 20)], strict=True
    ):
        assert detection["bbox"] == pytest.approx([0, 0, width, height], abs=1e-4)
        assert detection["category_id"] == 13
        mask = rle.decode(detection["segmentation"])
        assert mask.shape == (height, width)
        assert mask[1:-1, 1:-1].all()


def test_metrics_table_has_every_metric(split: Split) -> None:
    lines = metrics_table(score(split, perfect(split), masks=True)).splitlines()
    assert lines[0].split() == list(METRICS)
    for line, kind in zip(lines[1:], ("box", "mask"), strict=True):
        cells = line.split()
        assert cells[:2] == [kind, "1.000"]
        assert len(cells) == 13
        assert cells[1 + METRICS.index("APl")] == "-"


def test_draw_shows_detections(split: Split, tmp_path: Path) -> None:
    drawn, empty = tmp_path / "drawn.png", tmp_path / "empty.png"
    drawing.draw(split, perfect(split), drawn)
    drawing.draw(split, [d | {"score": 0.4} for d in perfect(split)], empty)
    with Image.open(drawn) as a, Image.open(empty) as b:
        assert a.size == b.size
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() > 1


def test_draw_accepts_few_images(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    drawing.draw(split, [], tmp_path / "few.png")
    assert (tmp_path / "few.png").stat().st_size > 1000
