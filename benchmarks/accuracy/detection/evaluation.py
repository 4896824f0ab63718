"""What a detector finds, and COCO's figures of it, by pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from benchmarks.accuracy.common.distributed import DistributedContext

from .coco import Split
from .dataset import Images

# In pycocotools' order: at all sizes of objects and at overlaps of .50 to .95; at .50; at .75; of
# small, medium and large objects. Recall with 1, 10, 100 detections in an image; by size.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}

Figures = dict[str, dict[str, float | None]]


@torch.no_grad()
def detect(
    model: nn.Module, split: Split, dist_context: DistributedContext, *, workers: int = 0
) -> list[dict[str, Any]]:
    """Find the objects in all images of a split, each image in one process alone.

    An image goes through the network by itself: beside a larger one it would get a border, over
    which SimAM takes its statistics, too.

    Args:
        model (nn.Module): a detector of torchvision; its labels are the places of the split's
            categories.
        split (Split): the images.
        dist_context (DistributedContext): those that share the images.
        workers (int): processes that read images for each of them.

    Returns:
        list of dict: detections in COCO's format, in the pixels of the image file.
    """
    images = Images(split)
    own = Subset(images, range(dist_context.rank, len(images), dist_context.world_size))
    loader = DataLoader(own, batch_size=None, num_workers=workers)
    categories = list(split.categories)
    training = model.training
    model.eval()
    found = []
    bar = tqdm(loader, "evaluate", leave=False, disable=None if dist_context.is_primary else True)
    for image, number in bar:
        result = model([image.to(dist_context.device)])[0]
        found += in_coco_format(result, number, categories)
    model.train(training)
    if dist_context.world_size == 1:
        return found
    parts: list[Any] = [None] * dist_context.world_size
    dist.all_gather_object(parts, found)
    return [detection for part in parts for detection in part]


def in_coco_format(
    result: dict[str, Tensor], image: int, categories: list[int]
) -> list[dict[str, Any]]:
    """What a detector of torchvision says of one image, in COCO's format."""
    boxes, labels, scores = (result[name].tolist() for name in ("boxes", "labels", "scores"))
    found = [
        {
            "image_id": image,
            "category_id": categories[label - 1],
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in result:
        masks = (result["masks"][:, 0] > 0.5).byte().cpu().numpy()
        for detection, mask in zip(found, masks, strict=True):
            detection["segmentation"] = rle.encode(np.asfortranarray(mask))
    return found


def score(split: Split, detections: list[dict[str, Any]], *, masks: bool) -> Figures:
    """COCO's twelve figures for boxes and, if asked, for masks, as parts of 1.

    Args:
        split (Split): what there is to find.
        detections (list of dict): what was found, in COCO's format.
        masks (bool): whether to score masks, too.

    Returns:
        dict: by "box" and "mask", and by the figures' names; None where there is nothing of a
            size to find.
    """
    truth = _coco(split.content)
    figures: Figures = {}
    for kind in KINDS if masks else ("box",):
        found = [
            detection | {"id": number, "iscrowd": 0, "area": _area(detection, kind)}
            for number, detection in enumerate(detections, 1)
        ]
        evaluation = COCOeval(truth, _coco(split.content | {"annotations": found}), KINDS[kind])
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats.tolist()
        figures[kind] = {
            name: None if value < 0 else value for name, value in zip(NAMES, values, strict=True)
        }
    return figures


def table(figures: Figures) -> str:
    """The figures in lines, a dash for what is not defined."""
    lines = [" " * 6 + "".join(f"{name:>7}" for name in NAMES)]
    for kind, values in figures.items():
        cells = ("-" if value is None else f"{value:.3f}" for value in values.values())
        lines.append(f"{kind:6}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def _area(detection: dict[str, Any], kind: str) -> float:
    """What pycocotools tells small from large by.

    Its own loader, given boxes and masks, takes the area of the box for both.
    """
    if kind == "mask":
        return float(rle.area(detection["segmentation"]))
    return detection["bbox"][2] * detection["bbox"][3]


def _coco(content: dict[str, list[dict[str, Any]]]) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
