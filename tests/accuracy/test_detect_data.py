"""Annotations in COCO's format, the data sets made from them, and the drawn shapes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for name in ("torchvision", "timm", "pycocotools"):
    pytest.importorskip(name)

from PIL import Image

from benchmarks.accuracy.common.sampler import seed_everything
from benchmarks.accuracy.detection import shapes
from benchmarks.accuracy.detection.coco import Content, read
from benchmarks.accuracy.detection.dataset import EvaluationDataset, TrainingDataset
from simam.messages import UserError
from tests.helpers.detection import annotation, content, store, stored


def changed(kind: str, index: int, **changes: Any) -> Content:
    """The content with other values in one entry; None removes a key."""
    result = content()
    entry = result[kind][index] | changes
    result[kind][index] = {key: value for key, value in entry.items() if value is not None}
    return result


def test_training_dataset_labels_follow_sorted_category_ids(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    assert list(split.categories.items()) == [(7, "house"), (13, "road"), (90, "tree")]
    examples = TrainingDataset(split, masks=True, flip=0.0)
    labels = [examples[i][1]["labels"].tolist() for i in range(len(examples))]
    assert labels == [[3, 1], [2, 1]]  # tree and house; road and house


def test_training_dataset_boxes_and_masks_are_in_pixels(tmp_path: Path) -> None:
    image, target = TrainingDataset(stored(tmp_path, content()), masks=True, flip=0.0)[1]
    assert image.shape == (3, 50, 20)
    assert target["boxes"].tolist() == [[0, 0, 20, 9], [4, 20, 12, 36]]
    assert target["boxes"].dtype == torch.float32
    expected = np.zeros((2, 50, 20), np.uint8)
    expected[0, :9], expected[1, 20:36, 4:12] = 1, 1
    assert np.array_equal(target["masks"], expected)
    pixels = np.asarray(Image.open(tmp_path / "val" / "b.png"))
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), pixels)


def test_training_dataset_mirrors_boxes_and_masks(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    image, target = TrainingDataset(split, masks=True, flip=0.0)[0]
    mirrored, flipped = TrainingDataset(split, masks=True, flip=1.0)[0]
    assert torch.equal(mirrored, image.flip(2))
    assert torch.equal(flipped["masks"], target["masks"].flip(2))
    for (x0, y0, x1, y1), box in zip(target["boxes"], flipped["boxes"], strict=True):
        assert box.tolist() == [40 - x1, y0, 40 - x0, y1]
    for mask, (x0, y0, x1, y1) in zip(flipped["masks"], flipped["boxes"].round(), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (
            np.abs(np.array(edges) - np.array([x0, y0, x1, y1])).max() <= 1
        )  # one box starts at 20.5


def test_training_dataset_mirrors_half_of_the_images_by_seed(tmp_path: Path) -> None:
    examples = TrainingDataset(stored(tmp_path, content()), masks=False, flip=0.5)
    plain, _ = TrainingDataset(examples.split, masks=False, flip=0.0)[0]

    def mirrored(number: int) -> bool:
        seed_everything(number)
        return not torch.equal(examples[0][0], plain)

    drawn = [mirrored(number) for number in range(200)]
    assert drawn == [mirrored(number) for number in range(200)]
    assert 70 <= sum(drawn) <= 130  # four standard deviations of 200 coins


def test_training_dataset_leaves_out_images_without_objects(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    assert [image["file_name"] for image in TrainingDataset(split, masks=True, flip=0).images] == [
        "a.png",
        "b.png",
    ]
    assert [number for _, number in EvaluationDataset(split)] == [5, 3, 8]


def test_training_dataset_leaves_out_crowds(tmp_path: Path) -> None:
    written = content()
    counts = {"size": [30, 40], "counts": [0, 30 * 40]}
    crowd = annotation(30, 5, 7, [0, 0, 40, 30]) | {"iscrowd": 1, "segmentation": counts}
    written["annotations"].append(crowd)
    split = stored(tmp_path, written)
    assert sum(a["iscrowd"] for a in split.content["annotations"]) == 1
    assert len(TrainingDataset(split, masks=True, flip=0)[0][1]["labels"]) == 2


@pytest.mark.parametrize("compressed", [True, False])
def test_training_dataset_decodes_run_length_masks(tmp_path: Path, compressed: bool) -> None:
    from pycocotools import mask as rle

    mask = np.zeros((30, 40), np.uint8)
    mask[5:9, 2:12], mask[7, 30] = 1, 1
    code: dict[str, Any] = rle.encode(np.asfortranarray(mask))
    code["counts"] = code["counts"].decode()
    if not compressed:  # column by column: how many zeros, how many ones, ...
        flat = mask.flatten(order="F")
        edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
        code["counts"] = np.diff(edges).tolist()
    split = stored(tmp_path, changed("annotations", 0, segmentation=code))
    assert np.array_equal(TrainingDataset(split, masks=True, flip=0)[0][1]["masks"][0], mask)


def test_training_dataset_merges_polygons_into_one_mask(tmp_path: Path) -> None:
    two = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]]
    split = stored(tmp_path, changed("annotations", 0, segmentation=two))
    mask = TrainingDataset(split, masks=True, flip=0)[0][1]["masks"][0]
    assert mask.sum() == 32
    assert mask[:4, :4].all()
    assert mask[10:14, 10:14].all()


def test_training_dataset_clips_boxes_to_the_image(tmp_path: Path) -> None:
    split = stored(tmp_path, changed("annotations", 0, bbox=[-5, 20, 10, 30]))
    assert TrainingDataset(split, masks=False, flip=0)[0][1]["boxes"][0].tolist() == [0, 20, 5, 30]


@pytest.mark.parametrize(
    "box",
    [[2, 3, 0, 8], [2, 3, 8, 0], [2, 3, -4, 8], [41, 3, 5, 5], [2, -9, 5, 9], [39.9999, 3, 5, 5]],
)
def test_coco_read_skips_empty_boxes(tmp_path: Path, box: list[float]) -> None:
    split = stored(tmp_path, changed("annotations", 1, bbox=box))
    assert split.skipped == "1 annotations with an empty box (21)"
    assert len(split.content["annotations"]) == 3
    assert TrainingDataset(split, masks=True, flip=0)[0][1]["labels"].tolist() == [3]


def test_coco_read_skips_box_with_nan(tmp_path: Path) -> None:
    text = json.dumps(content()).replace("20.5, 10, 12, 15", "NaN, 10, 12, 15", 1)
    split = read(store(tmp_path, text), "val", masks=False)
    assert split.skipped == "1 annotations with an empty box (21)"


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 2, 3, 4]], {"size": [30, 40]}, 5])
def test_coco_read_skips_objects_without_mask(tmp_path: Path, segmentation: Any) -> None:
    written = changed("annotations", 1, segmentation=segmentation)
    assert stored(tmp_path, written).skipped == "1 annotations without a mask (21)"
    assert stored(tmp_path, written, masks=False).skipped == ""


def test_coco_read_numbers_objects_from_one(tmp_path: Path) -> None:
    numbers = [a["id"] for a in stored(tmp_path, content()).content["annotations"]]
    assert numbers == [1, 2, 3, 4]


def without(kind: str) -> Content:
    result = content()
    del result[kind]
    return result


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("{", "instances_val.json is not JSON, or is truncated: Expecting property name"),
        ("\x00", "instances_val.json is not JSON, or is truncated"),
        ("[]", 'instances_val.json has no list "images"; expected a file in COCO\'s format, with '),
        (without("annotations"), 'instances_val.json has no list "annotations"'),
        (without("categories"), 'instances_val.json has no list "categories"'),
        (
            changed("annotations", 2, category_id=None),
            'instances_val.json: "annotations", entry 2: expected "category_id" (int), got None',
        ),
        (
            changed("annotations", 1, bbox=[1, 2, 3]),
            '"annotations", entry 1: expected "bbox" (x, y, width, height), got [1, 2, 3]',
        ),
        (changed("annotations", 1, area=None), 'entry 1: expected "area" (float), got None'),
        (changed("images", 0, file_name=None), '"images", entry 0: expected "file_name" (str)'),
        (changed("images", 1, id="b"), '"images", entry 1: expected "id" (int), got \'b\''),
        (
            changed("images", 1, file_name="gone.png"),
            "instances_val.json cannot be used; 1 images not found in {root}/val: gone.png",
        ),
        (
            changed("annotations", 3, category_id=8),
            "1 annotations with an unknown category_id: annotation 23 (category_id 8)",
        ),
        (
            changed("annotations", 0, image_id=77),
            "1 annotations with an unknown image_id: annotation 0 (image_id 77)",
        ),
        (
            changed("images", 1, id=5),
            "1 duplicate image ids: 5; 2 annotations with an unknown image",
        ),
        (changed("categories", 1, id=90), "1 duplicate category ids: 90"),
        (content() | {"annotations": []}, "instances_val.json has no objects; expected"),
        (
            content() | {"annotations": [annotation(4, 5, 7, [0, 0, 0, 0])]},
            "has no usable objects; skipped 1 annotations with an empty box (4); expected",
        ),
        (
            content() | {"annotations": [annotation(4, 5, 7, [0, 0, 9, 9]) | {"iscrowd": 1}]},
            "instances_val.json has no objects; expected",
        ),
    ],
)
def test_coco_read_refuses_broken_annotations(
    tmp_path: Path, written: Content | str, text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(text.format(root=tmp_path))) as raised:
        read(store(tmp_path, written), "val", masks=True)
    assert str(tmp_path / "annotations" / "instances_val.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_coco_read_counts_problems(tmp_path: Path) -> None:
    written = content()
    for entry in written["annotations"]:
        entry["category_id"] = 1
    with pytest.raises(
        UserError, match=r"4 annotations with an unknown category_id: .*, and 1 more$"
    ):
        stored(tmp_path, written)


def test_coco_read_names_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"instances_train2017.json: No such file or directory. Exp"
    ):
        read(tmp_path, "train2017", masks=False)


@pytest.mark.parametrize("size", [0, 10, 200])
def test_datasets_refuse_truncated_image(tmp_path: Path, size: int) -> None:
    split = stored(tmp_path, content())
    path = tmp_path / "val" / "b.png"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"cannot read the image {path}: "):
        EvaluationDataset(split)[1]
    with pytest.raises(UserError, match=f"cannot read the image {path}: "):
        TrainingDataset(split, masks=False, flip=0)[1]


def test_datasets_refuse_image_of_another_size(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    path = tmp_path / "val" / "b.png"
    Image.new("RGB", (21, 50)).save(path)
    with pytest.raises(UserError, match=f"{path} is 21 pixels wide and 50 high; its annotations"):
        EvaluationDataset(split)[1]


def test_datasets_convert_images_to_rgb(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    for mode in ("L", "P", "RGBA", "CMYK"):
        path = tmp_path / "val" / "b.png"
        Image.new(mode, (20, 50)).save(path, "tiff")
        assert EvaluationDataset(split)[1][0].shape == (3, 50, 20)


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        ({"size": [30, 40], "counts": "!"}, "instances_val.json: cannot decode the mask {'size'"),
        ({"size": [9, 9], "counts": [81]}, "a mask of 9 x 9 pixels for an image of 40 x 30"),
        ([["a"] * 6], "instances_val.json: cannot decode the mask [['a'"),
    ],
)
def test_training_dataset_refuses_broken_masks(
    tmp_path: Path, segmentation: Any, text: str
) -> None:
    split = stored(tmp_path, changed("annotations", 0, segmentation=segmentation))
    with pytest.raises(UserError, match=re.escape(text)):
        TrainingDataset(split, masks=True, flip=0)[0]


# The drawn shapes


def test_shapes_write_is_reproducible(tmp_path: Path) -> None:
    for folder, number in (("a", 0), ("b", 0), ("c", 1)):
        shapes.write(tmp_path / folder, {"train": 2, "val": 2}, seed=number)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.*"))]
    assert len(files) == 6
    for file in files:
        same, other, another = ((tmp_path / x / file).read_bytes() for x in "abc")
        assert same == other
        assert same != another
    assert (tmp_path / "a/train/000001.jpg").read_bytes() != (
        tmp_path / "a/val/000001.jpg"
    ).read_bytes()


def test_shapes_write_keeps_existing_split(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 1})
    file = tmp_path / "annotations/instances_val.json"
    file.write_text("mine")
    shapes.write(tmp_path, {"val": 1})
    assert file.read_text() == "mine"


def test_shapes_write_completes_unfinished_split(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 2})
    (tmp_path / "annotations/instances_val.json").unlink()
    (tmp_path / "val/000002.jpg").unlink()
    shapes.write(tmp_path, {"val": 2})
    read(tmp_path, "val", masks=True)


def test_shapes_boxes_and_areas_match_masks(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 12})
    split = read(tmp_path, "val", masks=True)
    examples = TrainingDataset(split, masks=True, flip=0)
    assert split.skipped == ""
    kinds, count = set(), 0
    for index, image in enumerate(examples.images):
        _, target = examples[index]
        for entry, mask, box in zip(
            split.objects[image["id"]], target["masks"], target["boxes"], strict=True
        ):
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == edges
            assert entry["area"] == mask.sum()
            kinds.add(entry["category_id"])
            count += 1
        assert target["masks"].sum(0).max() <= 1  # visible parts do not overlap
    assert kinds == {1, 2, 3}
    assert count > 20


def test_shapes_draw_fills_masks_with_one_colour() -> None:
    image, drawn = shapes.draw(np.random.default_rng(4))
    pixels = np.asarray(image, np.float64)
    for _, mask in drawn:
        assert pixels[mask].std(0).max() < 12  # the noise has a deviation of 8
        assert mask.sum() > 50
