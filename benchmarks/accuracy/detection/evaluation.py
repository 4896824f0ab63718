"""Runs a detector on a split, and computes COCO's metrics with pycocotools."""

import contextlib
import io
from itertools import chain
from typing import Any, TypeAlias

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
from simam.messages import table

from .coco import Content, Split
from .dataset import EvaluationDataset

# In pycocotools' order: AP over overlaps of .50 to .95; AP at .50; at .75; AP of small, medium and
# large objects. Recall with 1, 10 and 100 detections per image; recall by size.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_TYPES = {"box": "bbox", "mask": "segm"}

Metrics: TypeAlias = dict[str, dict[str, float | None]]


@torch.no_grad()
def detect(
    model: nn.Module, split: Split, dist_context: DistributedContext, *, workers: int = 0
) -> list[dict[str, Any]]:
    """Detect the objects in all images of a split; each image is processed once.

    The batch size is 1. In a batch, a smaller image would be padded, and SimAM's statistics would
    include the padding.

    Args:
        model (nn.Module): a detector of torchvision whose label n is the split's n-th category.
        split (Split): the images.
        dist_context (DistributedContext): the processes that share the images.
        workers (int): data-loading processes for each of them.

    Returns:
        list of dict: detections in COCO's format, in the pixels of the image file.
    """
    images = EvaluationDataset(split)
    own_images = Subset(images, range(dist_context.rank, len(images), dist_context.world_size))
    loader = DataLoader(own_images, batch_size=None, num_workers=workers)
    categories = list(split.categories)
    training = model.training
    model.eval()
    detections = []
    # None shows the progress bar only on a terminal.
    disable = None if dist_context.is_primary else True
    for image, image_id in tqdm(loader, "evaluate", leave=False, disable=disable):
        output = model([image.to(dist_context.device)])[0]
        detections += to_coco_format(output, image_id, categories)
    model.train(training)
    if dist_context.world_size == 1:
        return detections
    gathered: list[Any] = [None] * dist_context.world_size
    dist.all_gather_object(gathered, detections)
    return list(chain.from_iterable(gathered))


def to_coco_format(
    output: dict[str, Tensor], image_id: int, categories: list[int]
) -> list[dict[str, Any]]:
    """Convert the output of a torchvision detector for one image to COCO's format.

    Args:
        output (dict of str to Tensor): boxes, labels, scores and, for Mask R-CNN, masks.
        image_id (int): the image's id.
        categories (list of int): category ids; label n is the n-th of them, from 1.
    """
    boxes, labels, scores = (output[name].tolist() for name in ("boxes", "labels", "scores"))
    detections = [
        {
            "image_id": image_id,
            "category_id": categories[label - 1],
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in output:
        masks = (output["masks"][:, 0] > 0.5).byte().cpu().numpy()
        for detection, mask in zip(detections, masks, strict=True):
            detection["segmentation"] = rle.encode(np.asfortranarray(mask))
    return detections


def score(split: Split, detections: list[dict[str, Any]], *, masks: bool) -> Metrics:
    """Compute COCO's twelve metrics, from 0 to 1, for boxes and, if asked, for masks.

    Args:
        split (Split): the annotations.
        detections (list of dict): detections in COCO's format.
        masks (bool): whether to score masks, too.

    Returns:
        dict: metrics by "box" or "mask" and by name; None if the split has no object of that size.
    """
    ground_truth = _coco(split.content)
    metrics: Metrics = {}
    for kind in IOU_TYPES if masks else ("box",):
        annotations = [
            detection | {"id": number, "iscrowd": 0, "area": _area(detection, kind)}
            for number, detection in enumerate(detections, 1)
        ]
        predictions = _coco(split.content | {"annotations": annotations})
        evaluation = COCOeval(ground_truth, predictions, IOU_TYPES[kind])
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats.tolist()
        metrics[kind] = {
            name: None if value < 0 else value for name, value in zip(METRICS, values, strict=True)
        }
    return metrics


def metrics_table(metrics: Metrics) -> str:
    """Format metrics as a table, with a dash for None."""
    rows = [["", *METRICS]]
    for kind, values in metrics.items():
        cells = ("-" if value is None else f"{value:.3f}" for value in values.values())
        rows.append([kind, *cells])
    return table(rows, "<" + ">" * len(METRICS))


def _area(detection: dict[str, Any], kind: str) -> float:
    """The area by which pycocotools sorts a detection into small, medium and large.

    COCO.loadRes, given boxes and masks, would use the area of the box for both.
    """
    if kind == "mask":
        return float(rle.area(detection["segmentation"]))
    _, _, width, height = detection["bbox"]
    return float(width * height)


def _coco(content: Content) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
