"""The data sets of classification, and the errors about missing and damaged files."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("numpy", "timm", "torchvision"):
    pytest.importorskip(package, reason="the training scripts need the extra train")

import numpy as np
from PIL import Image

from benchmarks.accuracy.classification import datasets
from benchmarks.accuracy.classification.options import DATASETS
from benchmarks.accuracy.classification.recipes import RECIPES
from simam.messages import UserError
from tests.helpers.few_images import write_idx

SMALL, IMAGENET = (RECIPES[name] for name in ("small", "paper-resnet"))


def flat(dataset: Any) -> torch.Tensor:
    return torch.stack([image for image, _ in dataset])


def test_load_knows_every_dataset_of_the_command_line() -> None:
    assert tuple(datasets.LOADERS) == DATASETS


def test_load_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from sklearn.datasets import load_digits

    data = datasets.load("digits", None, SMALL)
    assert (len(data.train), len(data.test), data.size) == (1437, 360, 8)
    assert data.classes == list("0123456789")
    # Every image is in exactly one of the two sets, with scikit-learn's label.
    digits = load_digits()
    whole = {(image / 16 * 255).round().astype(np.uint8).tobytes(): [] for image in digits.images}
    for image, label in zip(digits.images, digits.target, strict=True):
        whole[(image / 16 * 255).round().astype(np.uint8).tobytes()].append(label)
    for part in (data.train, data.test):
        for image, label in zip(part.images, part.labels, strict=True):
            whole[image.tobytes()].remove(label)
    assert not any(whole.values())
    assert np.bincount(data.test.labels).min() == 35
    # Test images are normalised by the mean and standard deviation of the training images.
    images = torch.from_numpy(data.train.images) / 255
    expected = (torch.from_numpy(data.test.images[3]) / 255 - images.mean()) / images.std()
    found, label = data.test[3]
    assert found.shape == (3, 8, 8)
    torch.testing.assert_close(found, expected.expand(3, 8, 8).float(), rtol=1e-3, atol=1e-3)
    assert label == data.test.labels[3]
    again = datasets.load("digits", None, SMALL)
    assert torch.equal(flat(again.test), flat(data.test))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 5)):
        images = draw.integers(0, 256, (count, 28, 28), np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_load_fashion_mnist(fashion: Path) -> None:
    data = datasets.load("fashion-mnist", fashion, SMALL)
    assert (len(data.train), len(data.test), data.size) == (12, 5, 28)
    assert [label for _, label in data.test] == [0, 1, 2, 3, 4]
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    assert (data.train.images == expected).all()
    assert data.train[0][0].shape == (3, 28, 28)
    assert len(data.classes) == 10


@pytest.mark.skipif(
    not datasets.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_load_fashion_mnist_of_debian() -> None:
    data = datasets.load("fashion-mnist", None, SMALL)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert (np.bincount(data.train.labels) == 6000).all()
    assert data.classes[data.train.labels[0]] == "ankle boot"


def test_load_fashion_mnist_refuses_missing_and_damaged_files(fashion: Path) -> None:
    path = fashion / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        datasets.load("fashion-mnist", fashion, SMALL)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(
        UserError,
        match=r"t10k-images.* is damaged: expected an IDX file of rank 3 and",
    ):
        datasets.load("fashion-mnist", fashion, SMALL)
    path.write_bytes((fashion / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(
        UserError,
        match=r"t10k-images.* is damaged: expected an IDX file of rank 3 and",
    ):
        datasets.load("fashion-mnist", fashion, SMALL)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*t10k-images.*dataset-fashion-mnist"):
        datasets.load("fashion-mnist", fashion, SMALL)
    write_idx(path, np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(UserError, match="has 4 t10k images, but 5 labels"):
        datasets.load("fashion-mnist", fashion, SMALL)


def test_load_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder like CIFAR-10's but with few images, so without its checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": draw.integers(0, 256, (2, 3072), np.uint8), "labels": [3, 8]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(UserError, match=r"cifar-10-batches-py, unpacked from cifar-10-python"):
        datasets.load("cifar10", tmp_path, SMALL)
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = datasets.load("cifar10", tmp_path, RECIPES["paper-cifar"])
    assert (len(data.train), len(data.test), data.size) == (10, 2, 32)
    assert [label for _, label in data.test] == [3, 8]
    assert data.classes == list("abcdefghij")
    first = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)[0]
    assert (data.train.images[0] == first.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    mean = data.train.images.mean((0, 1, 2)) / 255  # of each colour
    deviation = data.train.images.std((0, 1, 2)) / 255
    expected = (data.test.images[0] / 255 - mean) / deviation
    torch.testing.assert_close(
        data.test[0][0].permute(1, 2, 0).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder"])
def test_load_asks_for_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data: expected .*, got none"):
        datasets.load(name, None, SMALL)
    with pytest.raises(UserError, match=str(tmp_path)):
        datasets.load(name, tmp_path, SMALL)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes, each of one colour."""
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                color = tuple(200 if c == number else 20 for c in range(3))
                Image.new("RGB", (40 + i, 30), color).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_load_image_folder(folders: Path) -> None:
    data = datasets.load("imagefolder", folders, IMAGENET)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.classes == ["ant", "bee", "cat"]
    for part in (data.train, data.test):
        for image, label in part:
            assert image.shape == (3, 224, 224)
            assert image.mean((1, 2)).argmax() == label
    small = datasets.load("imagefolder", folders, SMALL)
    assert small.size == 30  # the shorter side of the images
    assert small.test[0][0].shape == (3, 30, 30)
    assert datasets.load("imagefolder", folders, SMALL, 16).train[0][0].shape == (3, 16, 16)
    (folders / "val").rename(folders / "test")
    assert len(datasets.load("imagefolder", folders, IMAGENET).test) == 6


def test_load_image_folder_converts_to_rgb(folders: Path) -> None:
    for mode, name in (("L", "0.png"), ("RGBA", "1.png"), ("P", "2.png")):
        Image.new(mode, (40, 30)).save(folders / "train" / "ant" / name)
    data = datasets.load("imagefolder", folders, IMAGENET)
    assert {image.shape for image, _ in data.train} == {(3, 224, 224)}


def test_load_image_folder_refuses_defects(folders: Path) -> None:
    bad = folders / "train" / "bee" / "1.png"
    for content in (b"no image", bad.read_bytes()[:60], b""):
        bad.write_bytes(content)
        data = datasets.load("imagefolder", folders, IMAGENET)
        with pytest.raises(UserError, match=r"bee/1\.png cannot be read as an image"):
            flat(data.train)
    bad.unlink()
    (folders / "val" / "dog").mkdir()
    with pytest.raises(UserError, match=r"val/dog has no images; 1 of the 4 class folders"):
        datasets.load("imagefolder", folders, IMAGENET)
    Image.new("RGB", (9, 9)).save(folders / "val" / "dog" / "0.png")
    with pytest.raises(UserError, match="have different classes; only one of them has dog"):
        datasets.load("imagefolder", folders, IMAGENET)
    for path in sorted((folders / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UserError, match=r"find any class folder in .*val"):
        datasets.load("imagefolder", folders, IMAGENET)
    (folders / "val").rmdir()
    with pytest.raises(UserError, match=r"expected a folder with train/CLASS.*no folder .*test"):
        datasets.load("imagefolder", folders, IMAGENET)
