"""Labelled images to train on and to test on, from files on disk or embedded in a package."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from simam.messages import UserError, one_line

from .recipes import Recipe
from .transforms import Transform, transforms

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist

FASHION = ["T-shirt/top", "trouser", "pullover", "dress", "coat"]
FASHION += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]


@dataclass(frozen=True)
class Data:
    """Two sets of (image, class), as a network sees them.

    Attributes:
        train (Dataset): to train on, with random changes.
        test (Dataset): to test on, without.
        classes (list of str): names, in the order of the numbers.
        size (int): side of the images.
    """

    train: Dataset
    test: Dataset
    classes: list[str]
    size: int


class Arrays(Dataset):
    """Images in memory.

    Args:
        images (ndarray): N x H x W, or N x H x W x 3, uint8.
        labels (ndarray): N.
        transform (callable): what an image is turned into.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


def load(name: str, folder: Path | None, recipe: Recipe, size: int | None = None) -> Data:
    """Load a dataset by its name, with the transforms of a recipe.

    Args:
        name (str): one of `DATASETS`.
        folder (Path, optional): where its files are; digits need none.
        recipe (Recipe): which transforms.
        size (int, optional): side of what the network sees, if not the recipe's.

    Raises:
        UserError: files are missing or damaged, or a class has no images; names the file.
    """
    return DATASETS[name](folder, recipe, size or recipe.input_size)


def _digits(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    """scikit-learn's 1797 digits of 8 x 8, of which a fifth is tested on, the same at all times."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(
            f'the digits need scikit-learn ({error}): pip install "simam[train]"'
        ) from error
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    names = [str(name) for name in digits.target_names]
    return _in_memory((train_x, train_y), (test_x, test_y), names, recipe, size)


def _fashion_mnist(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    folder = folder or FASHION_MNIST
    parts = []
    for part in ("train", "t10k"):
        images, labels = (
            _idx(folder / f"{part}-{kind}.gz", dimensions)
            for kind, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1))
        )
        if len(images) != len(labels):
            raise UserError(
                f"{folder} has {len(images)} images of {part}, but {len(labels)} labels"
            )
        parts.append((images, labels))
    return _in_memory(*parts, FASHION, recipe, size)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the format of MNIST: two zero bytes, the type, the rank, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"cannot read {path}: no such file. Install Debian's package dataset-fashion-mnist, or "
            "name the folder of the four .gz files by --data"
        ) from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    start = 4 + 4 * dimensions
    sizes, values = [], np.frombuffer(content[start:], np.uint8)
    if len(content) >= start and content[:4] == bytes((0, 0, 8, dimensions)):
        sizes = np.frombuffer(content[4:start], ">u4").tolist()
    if not sizes or values.size != math.prod(sizes):
        raise UserError(f"{path} is damaged: expected an IDX file of rank {dimensions}, of bytes")
    return values.reshape(sizes)


def _cifar(kind: str) -> Callable[[Path | None, Recipe, int | None], Data]:
    def load(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
        dataset = getattr(torchvision_datasets, kind)
        expected = f"the folder that holds {dataset.base_folder}, unpacked from {dataset.filename}"
        if folder is None:
            raise UserError(f"--data: expected {expected}, got none")
        try:
            train, test = (dataset(folder, train=train) for train in (True, False))
        except Exception as error:  # torchvision's, or a pickle's that breaks off
            raise UserError(f"--data {folder}: expected {expected}: {one_line(error)}") from error
        parts = [(part.data, np.array(part.targets)) for part in (train, test)]
        return _in_memory(*parts, train.classes, recipe, size)

    return load


def _in_memory(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: list[str],
    recipe: Recipe,
    size: int | None,
) -> Data:
    images = train[0]
    own = images.shape[1]
    axes = (0, 1, 2)
    mean, std = (np.broadcast_to(f(images / 255, axis=axes), 3).tolist() for f in (np.mean, np.std))
    prepare = transforms(recipe, size or own, tuple(mean), tuple(std))
    return Data(Arrays(*train, prepare[0]), Arrays(*test, prepare[1]), classes, size or own)


def _folders(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    """`train` and `val`, or `test`, each with a folder for every class, as ImageNet's."""
    expected = "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE (or test)"
    if folder is None:
        raise UserError(f"--data: expected {expected}, got none")
    held_out = folder / ("val" if (folder / "val").is_dir() else "test")
    missing = [str(part) for part in (folder / "train", held_out) if not part.is_dir()]
    if missing:
        raise UserError(f"--data: expected {expected}; no folder {' nor '.join(missing)}")
    train, test = _folder(folder / "train"), _folder(held_out)
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{folder / 'train'} and {held_out} have different classes: {len(different)} are in "
            f"one alone, such as {different[0]}"
        )
    if size is None:
        width, height = train[0][0].size
        size = min(width, height)
    train.transform, test.transform = transforms(
        recipe, size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    )
    return Data(train, test, train.classes, size)


def _folder(path: Path) -> torchvision_datasets.ImageFolder:
    try:
        data = torchvision_datasets.ImageFolder(path, loader=_open, allow_empty=True)
    except FileNotFoundError as error:  # no class at all
        raise UserError(str(error)) from error
    empty = sorted(set(range(len(data.classes))) - set(data.targets))
    if empty:
        raise UserError(
            f"{path / data.classes[empty[0]]} holds no image; {len(empty)} of the "
            f"{len(data.classes)} classes in {path} are empty. Remove the folder, or fill it"
        )
    return data


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # as PIL's readers of formats raise
        raise UserError(f"{path} cannot be read as an image: {one_line(error)}") from error


DATASETS: dict[str, Callable[[Path | None, Recipe, int | None], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagefolder": _folders,
}
