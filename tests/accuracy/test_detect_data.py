"""Annotations in COCO's format: what is read from them, and what is said of broken ones."""

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
from benchmarks.accuracy.detection.coco import read
from benchmarks.accuracy.detection.dataset import Examples, Images
from simam.messages import UserError
from tests.helpers.detection import Content, annotation, content, store, stored


def changed(kind: str, place: int, **changes: Any) -> Content:
    """The content with other values in one entry; None takes a key away."""
    found = content()
    entry = found[kind][place] | changes
    found[kind][place] = {key: value for key, value in entry.items() if value is not None}
    return found


def test_labels_are_the_places_of_the_category_ids(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    assert list(split.categories.items()) == [(7, "house"), (13, "road"), (90, "tree")]
    examples = Examples(split, masks=True, flip=0.0)
    labels = [examples[i][1]["labels"].tolist() for i in range(len(examples))]
    assert labels == [[3, 1], [2, 1]]  # tree and house; road and house


def test_boxes_and_masks_are_in_pixels(tmp_path: Path) -> None:
    image, target = Examples(stored(tmp_path, content()), masks=True, flip=0.0)[1]
    assert image.shape == (3, 50, 20)
    assert target["boxes"].tolist() == [[0, 0, 20, 9], [4, 20, 12, 36]]
    assert target["boxes"].dtype == torch.float32
    expected = np.zeros((2, 50, 20), np.uint8)
    expected[0, :9], expected[1, 20:36, 4:12] = 1, 1
    assert np.array_equal(target["masks"], expected)
    pixels = np.asarray(Image.open(tmp_path / "val" / "b.png"))
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0), pixels)


def test_a_mirrored_image_takes_boxes_and_masks_along(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    image, target = Examples(split, masks=True, flip=0.0)[0]
    mirrored, flipped = Examples(split, masks=True, flip=1.0)[0]
    assert torch.equal(mirrored, image.flip(2))
    assert torch.equal(flipped["masks"], target["masks"].flip(2))
    for (x0, y0, x1, y1), box in zip(target["boxes"], flipped["boxes"], strict=True):
        assert box.tolist() == [40 - x1, y0, 40 - x0, y1]
    for mask, (x0, y0, x1, y1) in zip(flipped["masks"], flipped["boxes"].round(), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.array(found) - np.array([x0, y0, x1, y1])).max() <= 1  # 20.5 of a pixel


def test_half_of_the_images_are_mirrored_as_the_seed_says(tmp_path: Path) -> None:
    examples = Examples(stored(tmp_path, content()), masks=False, flip=0.5)
    plain, _ = Examples(examples.split, masks=False, flip=0.0)[0]

    def mirrored(number: int) -> bool:
        seed_everything(number)
        return not torch.equal(examples[0][0], plain)

    drawn = [mirrored(number) for number in range(200)]
    assert drawn == [mirrored(number) for number in range(200)]
    assert 70 <= sum(drawn) <= 130  # four standard deviations of 200 coins


def test_images_without_objects_are_evaluated_and_not_trained_on(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    assert [image["file_name"] for image in Examples(split, masks=True, flip=0).images] == [
        "a.png",
        "b.png",
    ]
    assert [number for _, number in Images(split)] == [5, 3, 8]


def test_crowds_are_kept_and_not_trained_on(tmp_path: Path) -> None:
    written = content()
    counts = {"size": [30, 40], "counts": [0, 30 * 40]}
    crowd = annotation(30, 5, 7, [0, 0, 40, 30]) | {"iscrowd": 1, "segmentation": counts}
    written["annotations"].append(crowd)
    split = stored(tmp_path, written)
    assert sum(a["iscrowd"] for a in split.content["annotations"]) == 1
    assert len(Examples(split, masks=True, flip=0)[0][1]["labels"]) == 2


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_as_run_lengths(tmp_path: Path, compressed: bool) -> None:
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
    assert np.array_equal(Examples(split, masks=True, flip=0)[0][1]["masks"][0], mask)


def test_several_polygons_are_one_mask(tmp_path: Path) -> None:
    two = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]]
    split = stored(tmp_path, changed("annotations", 0, segmentation=two))
    mask = Examples(split, masks=True, flip=0)[0][1]["masks"][0]
    assert mask.sum() == 32
    assert mask[:4, :4].all()
    assert mask[10:14, 10:14].all()


def test_a_box_is_cut_at_the_border(tmp_path: Path) -> None:
    split = stored(tmp_path, changed("annotations", 0, bbox=[-5, 20, 10, 30]))
    assert Examples(split, masks=False, flip=0)[0][1]["boxes"][0].tolist() == [0, 20, 5, 30]


@pytest.mark.parametrize(
    "box",
    [[2, 3, 0, 8], [2, 3, 8, 0], [2, 3, -4, 8], [41, 3, 5, 5], [2, -9, 5, 9], [39.9999, 3, 5, 5]],
)
def test_empty_boxes_are_left_out_and_named(tmp_path: Path, box: list[float]) -> None:
    split = stored(tmp_path, changed("annotations", 1, bbox=box))
    assert split.left_out == "1 annotations with an empty box (21)"
    assert len(split.content["annotations"]) == 3
    assert Examples(split, masks=True, flip=0)[0][1]["labels"].tolist() == [3]


def test_a_box_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    text = json.dumps(content()).replace("20.5, 10, 12, 15", "NaN, 10, 12, 15", 1)
    split = read(store(tmp_path, text), "val", masks=False)
    assert split.left_out == "1 annotations with an empty box (21)"


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 2, 3, 4]], {"size": [30, 40]}, 5])
def test_objects_without_a_mask(tmp_path: Path, segmentation: Any) -> None:
    written = changed("annotations", 1, segmentation=segmentation)
    assert stored(tmp_path, written).left_out == "1 annotations without a mask (21)"
    assert stored(tmp_path, written, masks=False).left_out == ""


def test_objects_are_numbered_from_one(tmp_path: Path) -> None:
    numbers = [a["id"] for a in stored(tmp_path, content()).content["annotations"]]
    assert numbers == [1, 2, 3, 4]


def without(kind: str) -> Content:
    found: Any = content()
    del found[kind]
    return found


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("{", "instances_val.json is not JSON, or cut short: Expecting property name"),
        ("\x00", "instances_val.json is not JSON, or cut short"),
        ("[]", 'instances_val.json has no list "images"; expected a file of COCO\'s format, with '),
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
            "instances_val.json cannot be used; 1 images that are not in {root}/val: gone.png",
        ),
        (
            changed("annotations", 3, category_id=8),
            "1 annotations of an unknown category: annotation 23 (category 8)",
        ),
        (
            changed("annotations", 0, image_id=77),
            "1 annotations of an image that is not listed: annotation 0 (image 77)",
        ),
        (changed("images", 1, id=5), "1 images twice: image 5; 2 annotations of an image that is"),
        (changed("categories", 1, id=90), "1 categories twice: category 90"),
        (content() | {"annotations": []}, "instances_val.json has no objects; expected"),
        (
            content() | {"annotations": [annotation(4, 5, 7, [0, 0, 0, 0])]},
            "has no objects of use: 1 annotations with an empty box (4); expected",
        ),
        (
            content() | {"annotations": [annotation(4, 5, 7, [0, 0, 9, 9]) | {"iscrowd": 1}]},
            "instances_val.json has no objects; expected",
        ),
    ],
)
def test_broken_annotations(tmp_path: Path, written: Content | str, text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text.format(root=tmp_path))) as raised:
        read(store(tmp_path, written), "val", masks=True)
    assert str(tmp_path / "annotations" / "instances_val.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    written = content()
    for found in written["annotations"]:
        found["category_id"] = 1
    with pytest.raises(UserError, match=r"4 annotations of an unknown category: .*, \.\.\.$"):
        stored(tmp_path, written)


def test_no_annotations_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"instances_train2017.json: No such file or directory. Exp"
    ):
        read(tmp_path, "train2017", masks=False)


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_an_image_that_is_cut_short(tmp_path: Path, cut: int) -> None:
    split = stored(tmp_path, content())
    path = tmp_path / "val" / "b.png"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"cannot read the image {path}: "):
        Images(split)[1]
    with pytest.raises(UserError, match=f"cannot read the image {path}: "):
        Examples(split, masks=False, flip=0)[1]


def test_an_image_of_another_size(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    path = tmp_path / "val" / "b.png"
    Image.new("RGB", (21, 50)).save(path)
    with pytest.raises(UserError, match=f"{path} is 21 pixels wide and 50 high; its annotations"):
        Images(split)[1]


def test_grey_and_transparent_images_are_read(tmp_path: Path) -> None:
    split = stored(tmp_path, content())
    for mode in ("L", "P", "RGBA", "CMYK"):
        path = tmp_path / "val" / "b.png"
        Image.new(mode, (20, 50)).save(path, "tiff")
        assert Images(split)[1][0].shape == (3, 50, 20)


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        ({"size": [30, 40], "counts": "!"}, "instances_val.json: no mask can be made of {'size'"),
        ({"size": [9, 9], "counts": [81]}, "a mask of 9 x 9 pixels for an image of 40 x 30"),
        ([["a"] * 6], "instances_val.json: no mask can be made of [['a'"),
    ],
)
def test_broken_masks(tmp_path: Path, segmentation: Any, text: str) -> None:
    split = stored(tmp_path, changed("annotations", 0, segmentation=segmentation))
    with pytest.raises(UserError, match=re.escape(text)):
        Examples(split, masks=True, flip=0)[0]


# The drawn shapes


def test_the_shapes_are_the_same_for_a_seed(tmp_path: Path) -> None:
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


def test_shapes_that_are_there_are_left_alone(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 1})
    file = tmp_path / "annotations/instances_val.json"
    file.write_text("mine")
    shapes.write(tmp_path, {"val": 1})
    assert file.read_text() == "mine"


def test_shapes_that_were_cut_short_are_drawn_again(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 2})
    (tmp_path / "annotations/instances_val.json").unlink()
    (tmp_path / "val/000002.jpg").unlink()
    shapes.write(tmp_path, {"val": 2})
    read(tmp_path, "val", masks=True)


def test_boxes_and_areas_of_the_shapes_are_those_of_their_masks(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"val": 12})
    split = read(tmp_path, "val", masks=True)
    examples = Examples(split, masks=True, flip=0)
    assert split.left_out == ""
    kinds, shown = set(), 0
    for index, image in enumerate(examples.images):
        _, target = examples[index]
        for found, mask, box in zip(
            split.objects[image["id"]], target["masks"], target["boxes"], strict=True
        ):
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == edges
            assert found["area"] == mask.sum()
            kinds.add(found["category_id"])
            shown += 1
        assert target["masks"].sum(0).max() <= 1  # what one sees of them does not overlap
    assert kinds == {1, 2, 3}
    assert shown > 20


def test_a_shape_has_its_outline_and_one_colour() -> None:
    picture, found = shapes.draw(np.random.default_rng(4))
    pixels = np.asarray(picture, np.float64)
    for _, mask in found:
        assert pixels[mask].std(0).max() < 12  # 8 are drawn
        assert mask.sum() > 50
