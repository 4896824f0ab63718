"""Reads annotations in COCO's format and checks them before a training starts."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

from simam.messages import UserError, first_few

MIN_SIDE = 1e-3  # of a box, in pixels; a shorter side could vanish in float32

Content: TypeAlias = dict[str, list[dict[str, Any]]]  # the lists of an annotation file

_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int,), "file_name": (str,), "width": (int,), "height": (int,)},
    "annotations": {
        "id": (int,),
        "image_id": (int,),
        "category_id": (int,),
        "bbox": (list,),
        "area": (int, float),
    },
    "categories": {"id": (int,), "name": (str,)},
}
_by_id = itemgetter("id")


@dataclass(frozen=True)
class Split:
    """One split of a data set, for training or for evaluation.

    Attributes:
        file (Path): the annotation file.
        folder (Path): the folder of the images.
        content (dict): the lists of the annotation file, without skipped annotations.
        skipped (str): how many annotations were skipped, and why; empty if none were.
        digest (str): a hash of the annotation file.
    """

    file: Path
    folder: Path
    content: Content
    skipped: str
    digest: str

    @cached_property
    def categories(self) -> dict[int, str]:
        """Category names by id, sorted by id; label n of a network is the n-th of them, from 1."""
        return {c["id"]: c["name"] for c in sorted(self.content["categories"], key=_by_id)}

    @cached_property
    def objects(self) -> dict[int, list[dict[str, Any]]]:
        """Annotations by image id, without crowds."""
        objects = defaultdict(list)
        for annotation in self.content["annotations"]:
            if not annotation["iscrowd"]:
                objects[annotation["image_id"]].append(annotation)
        return objects


def read(root: Path, split: str, *, masks: bool) -> Split:
    """Read and check `root/annotations/instances_SPLIT.json`, for the images in `root/SPLIT/`.

    Args:
        root (Path): the folder of the data set.
        split (str): the name of the split, such as "train2017".
        masks (bool): whether every object needs a mask.

    Raises:
        UserError: the file cannot be read or is not in COCO's format, contradicts itself, lists
            missing images, or has no objects.
    """
    file, folder = root / "annotations" / f"instances_{split}.json", root / split
    text = _read_bytes(file)
    content = _parse(text, file)
    problems = [
        f"{len(entries)} {problem}: {first_few(entries)}"
        for problem, entries in _problems(content, folder).items()
        if entries
    ]
    if problems:
        raise UserError(f"{file} cannot be used; {'; '.join(problems)}")
    annotations, skipped = _usable(content, masks=masks)
    if not any(not annotation["iscrowd"] for annotation in annotations):
        raise UserError(
            f"{file} has no {f'usable objects; skipped {skipped}' if skipped else 'objects'}; "
            f'expected "annotations" with boxes{" and masks" if masks else ""}'
        )
    digest = hashlib.sha256(text).hexdigest()[:16]
    return Split(file, folder, content | {"annotations": annotations}, skipped, digest)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror or error}. Expected an annotation file; "
            "--data is the folder that contains annotations/, and --splits names the splits"
        ) from error


def _parse(text: bytes, file: Path) -> Content:
    """Parse an annotation file; check that its lists and their entries have the required keys."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON, or is truncated: {error}") from error
    for name, required in _REQUIRED.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f'{file} has no list "{name}"; expected a file in COCO\'s format, with '
                f"{', '.join(_REQUIRED)}"
            )
        for index, entry in enumerate(entries):
            for key, types in required.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                valid = isinstance(value, types) and not isinstance(value, bool)
                if not valid or (key == "bbox" and not _is_box(value)):
                    expected = "x, y, width, height" if key == "bbox" else types[-1].__name__
                    raise UserError(
                        f'{file}: "{name}", entry {index}: expected "{key}" ({expected}), '
                        f"got {value!r:.60}"
                    )
    return dict(content)


def _is_box(value: Any) -> bool:
    return len(value) == 4 and all(isinstance(number, (int, float)) for number in value)


def _problems(content: Content, folder: Path) -> dict[str, list[str]]:
    """Reasons not to train on an annotation file, each with the entries concerned."""
    images, annotations, categories = (content[name] for name in _REQUIRED)
    image_ids, category_ids = set(map(_by_id, images)), set(map(_by_id, categories))
    return {
        "duplicate image ids": _duplicate_ids(images),
        "duplicate category ids": _duplicate_ids(categories),
        f"images not found in {folder}": [
            image["file_name"] for image in images if not (folder / image["file_name"]).is_file()
        ],
        "annotations with an unknown category_id": [
            f"annotation {a['id']} (category_id {a['category_id']})"
            for a in annotations
            if a["category_id"] not in category_ids
        ],
        "annotations with an unknown image_id": [
            f"annotation {a['id']} (image_id {a['image_id']})"
            for a in annotations
            if a["image_id"] not in image_ids
        ],
    }


def _duplicate_ids(entries: list[dict[str, Any]]) -> list[str]:
    return [str(number) for number, count in Counter(map(_by_id, entries)).items() if count > 1]


def _usable(content: Content, *, masks: bool) -> tuple[list[dict[str, Any]], str]:
    """The annotations with a non-empty box and, if required, a mask; and why others are skipped.

    The annotations get new ids, from 1: pycocotools never matches an object whose id is 0.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    usable: list[dict[str, Any]] = []
    empty, maskless = [], []
    for annotation in content["annotations"]:
        x0, y0, x1, y1 = corners(annotation["bbox"], *sizes[annotation["image_id"]])
        if not (x1 - x0 >= MIN_SIDE and y1 - y0 >= MIN_SIDE):  # true for a NaN, too
            empty.append(str(annotation["id"]))
        elif masks and not _has_mask(annotation.get("segmentation")):
            maskless.append(str(annotation["id"]))
        else:
            crowd = annotation.get("iscrowd", 0)
            usable.append(annotation | {"id": len(usable) + 1, "iscrowd": crowd})
    reasons = {"with an empty box": empty, "without a mask": maskless}
    skipped = [
        f"{len(ids)} annotations {reason} ({first_few(ids)})"
        for reason, ids in reasons.items()
        if ids
    ]
    return usable, ", ".join(skipped)


def _has_mask(segmentation: Any) -> bool:
    """Whether a segmentation is a run-length code, or polygons of at least three corners."""
    if isinstance(segmentation, dict):
        return {"counts", "size"} <= set(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return False
    return all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation)


def corners(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Convert a box (x, y, width, height) to its corners (x0, y0, x1, y1), clipped to the image."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
