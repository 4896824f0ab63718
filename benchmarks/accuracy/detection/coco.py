"""Annotations in COCO's format, checked before anything is trained on them."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from simam.messages import UserError, first_few

EMPTY = 1e-3  # of a pixel; a side that is shorter could vanish in float32

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


@dataclass(frozen=True)
class Split:
    """One part of a data set, for training or for evaluation.

    Attributes:
        file (Path): the annotations.
        folder (Path): the images.
        content (dict): the annotations as COCO writes them, without those that hold nothing.
        left_out (str): which annotations those are; empty if there are none.
        digest (str): changes with the file.
    """

    file: Path
    folder: Path
    content: dict[str, list[dict[str, Any]]]
    left_out: str
    digest: str

    @cached_property
    def categories(self) -> dict[int, str]:
        """Names by ids, in the order of the ids; the place in it, from 1, is a network's label."""
        return {c["id"]: c["name"] for c in sorted(self.content["categories"], key=_id)}

    @cached_property
    def objects(self) -> dict[int, list[dict[str, Any]]]:
        """Annotations by the ids of their images, without crowds."""
        objects = defaultdict(list)
        for annotation in self.content["annotations"]:
            if not annotation["iscrowd"]:
                objects[annotation["image_id"]].append(annotation)
        return objects


def read(root: Path, split: str, *, masks: bool) -> Split:
    """Read and check `root/annotations/instances_SPLIT.json`, of the images in `root/SPLIT/`.

    Args:
        root (Path): the folder of the data set.
        split (str): the name of the part, such as "train2017".
        masks (bool): whether every object needs a mask.

    Raises:
        UserError: the file cannot be read or is not in COCO's format, contradicts itself, lists
            images that are not there, or has no objects.
    """
    file, folder = root / "annotations" / f"instances_{split}.json", root / split
    text = _bytes(file)
    content = _parsed(text, file)
    problems = [
        f"{len(found)} {what}: {first_few(found)}"
        for what, found in _contradictions(content, folder).items()
        if found
    ]
    if problems:
        raise UserError(f"{file} cannot be used; {'; '.join(problems)}")
    annotations, left_out = _useful(content, masks=masks)
    if not any(not annotation["iscrowd"] for annotation in annotations):
        raise UserError(
            f"{file} has no objects{f' of use: {left_out}' if left_out else ''}; expected "
            f'"annotations" with boxes{" and masks" if masks else ""}'
        )
    digest = hashlib.sha256(text).hexdigest()[:16]
    return Split(file, folder, content | {"annotations": annotations}, left_out, digest)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror or error}. Expected annotations there; "
            "--data is the folder over annotations/, and --splits names the parts"
        ) from error


def _parsed(text: bytes, file: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists that COCO's format has, each entry with all that is needed of it."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON, or cut short: {error}") from error
    for name, required in _REQUIRED.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f'{file} has no list "{name}"; expected a file of COCO\'s format, with '
                f"{', '.join(_REQUIRED)}"
            )
        for place, entry in enumerate(entries):
            for key, types in required.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                fits = isinstance(value, types) and not isinstance(value, bool)
                if not fits or (key == "bbox" and not _is_box(value)):
                    expected = "x, y, width, height" if key == "bbox" else types[-1].__name__
                    raise UserError(
                        f'{file}: "{name}", entry {place}: expected "{key}" ({expected}), '
                        f"got {value!r:.60}"
                    )
    return content


def _is_box(value: list[Any]) -> bool:
    return len(value) == 4 and all(isinstance(number, (int, float)) for number in value)


def _contradictions(content: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, list[str]]:
    """What no training should start with, each with the places."""
    images, annotations, categories = (content[name] for name in _REQUIRED)
    image_ids, category_ids = set(map(_id, images)), set(map(_id, categories))
    return {
        "images twice": _twice(images, "image"),
        "categories twice": _twice(categories, "category"),
        f"images that are not in {folder}": [
            image["file_name"] for image in images if not (folder / image["file_name"]).is_file()
        ],
        "annotations of an unknown category": [
            f"annotation {a['id']} (category {a['category_id']})"
            for a in annotations
            if a["category_id"] not in category_ids
        ],
        "annotations of an image that is not listed": [
            f"annotation {a['id']} (image {a['image_id']})"
            for a in annotations
            if a["image_id"] not in image_ids
        ],
    }


def _twice(entries: list[dict[str, Any]], what: str) -> list[str]:
    counts = Counter(map(_id, entries))
    return [f"{what} {number}" for number, count in counts.items() if count > 1]


def _useful(
    content: dict[str, list[dict[str, Any]]], *, masks: bool
) -> tuple[list[dict[str, Any]], str]:
    """The annotations that hold something, and which do not.

    They are numbered anew, from 1: to pycocotools, an object with the number 0 is never found.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    useful, empty, maskless = [], [], []
    for annotation in content["annotations"]:
        x0, y0, x1, y1 = corners(annotation["bbox"], *sizes[annotation["image_id"]])
        if not (x1 - x0 >= EMPTY and y1 - y0 >= EMPTY):  # and so is a box of NaN
            empty.append(str(annotation["id"]))
        elif masks and not _has_mask(annotation.get("segmentation")):
            maskless.append(str(annotation["id"]))
        else:
            crowd = annotation.get("iscrowd", 0)
            useful.append(annotation | {"id": len(useful) + 1, "iscrowd": crowd})
    left_out = {"with an empty box": empty, "without a mask": maskless}
    notes = [
        f"{len(ids)} annotations {what} ({first_few(ids)})" for what, ids in left_out.items() if ids
    ]
    return useful, ", ".join(notes)


def _has_mask(segmentation: Any) -> bool:
    """Whether a segmentation is run lengths, or polygons of three corners and more."""
    if isinstance(segmentation, dict):
        return {"counts", "size"} <= set(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return False
    return all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation)


def corners(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The part of a box (x, y, width, height) that is in the image, by its corners."""
    x, y, w, h = box
    return max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)


def _id(entry: dict[str, Any]) -> int:
    return entry["id"]
