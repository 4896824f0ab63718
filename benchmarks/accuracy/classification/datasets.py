"""Labelled training and test images, from files on disk or from scikit-learn."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from simam.messages import UserError, first_few, install_hint, one_line

from .recipes import Recipe
from .transforms import Transform, make_transforms

Array: TypeAlias = np.ndarray[Any, Any]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist

_FASHION_CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat"]
_FASHION_CLASSES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]


class Arrays(Dataset[tuple[Tensor, int]]):
    """Labelled images in memory.

    Args:
        images (ndarray): uint8, N x H x W, or N x H x W x 3.
        labels (ndarray): N integers.
        transform (callable): turns a PIL image into the network's input.
    """

    def __init__(self, images: Array, labels: Array, transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image), int(self.labels[index])


LabelledImages: TypeAlias = Arrays | torchvision_datasets.ImageFolder


@dataclass(frozen=True)
class Data:
    """A training set and a test set of (image, class), transformed for the network.

    Attributes:
        train (Dataset): the training set, with random augmentation.
        test (Dataset): the test set, without.
        classes (list of str): the names of the classes, in the order of the labels.
        size (int): side of the images, in pixels.
    """

    train: LabelledImages
    test: LabelledImages
    classes: list[str]
    size: int


def load(name: str, folder: Path | None, recipe: Recipe, size: int | None = None) -> Data:
    """Load a dataset by its name, with the transforms of a recipe.

    Args:
        name (str): one of `options.DATASETS`.
        folder (Path, optional): the folder of its files; "digits" needs none.
        recipe (Recipe): which transforms.
        size (int, optional): side of the network's input, if not the recipe's.

    Raises:
        UserError: files are missing or damaged, or a class has no images; names the file.
    """
    return LOADERS[name](folder, recipe, size or recipe.input_size)


def _digits(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    """scikit-learn's 1797 digits of 8 x 8, of which a fixed fifth is the test set."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(f"digits need scikit-learn ({error}); {install_hint('train')}") from error
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    classes = [str(name) for name in digits.target_names]
    return _in_memory((train_x, train_y), (test_x, test_y), classes, recipe, size)


def _fashion_mnist(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    folder = folder or FASHION_MNIST
    train, test = (_read_mnist(folder, split) for split in ("train", "t10k"))
    return _in_memory(train, test, _FASHION_CLASSES, recipe, size)


def _read_mnist(folder: Path, split: str) -> tuple[Array, Array]:
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} {split} images, but {len(labels)} labels")
    return images, labels


def _read_idx(path: Path, dimensions: int) -> Array:
    """Read MNIST's format: two zero bytes, the dtype, the number of dimensions, sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"cannot read {path}: no such file. Install Debian's package dataset-fashion-mnist, or "
            "give the folder of the four .gz files with --data"
        ) from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    start = 4 + 4 * dimensions
    sizes, values = [], np.frombuffer(content[start:], np.uint8)
    if len(content) >= start and content[:4] == bytes((0, 0, 8, dimensions)):
        sizes = np.frombuffer(content[4:start], ">u4").tolist()
    if not sizes or values.size != math.prod(sizes):
        raise UserError(
            f"{path} is damaged: expected an IDX file of uint8 with {dimensions} dimensions"
        )
    return values.reshape(sizes)


def _cifar(kind: str) -> Callable[[Path | None, Recipe, int | None], Data]:
    def load(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
        dataset = getattr(torchvision_datasets, kind)
        expected = f"the folder that holds {dataset.base_folder}, unpacked from {dataset.filename}"
        if folder is None:
            raise UserError(f"--data: expected {expected}, got none")
        try:
            splits = [dataset(folder, train=train) for train in (True, False)]
        except Exception as error:  # torchvision's own, or that of a pickle that is cut short
            raise UserError(f"--data {folder}: expected {expected}: {one_line(error)}") from error
        train, test = ((split.data, np.array(split.targets)) for split in splits)
        return _in_memory(train, test, splits[0].classes, recipe, size)

    return load


def _in_memory(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    classes: list[str],
    recipe: Recipe,
    size: int | None,
) -> Data:
    """Normalise by the mean and standard deviation of the training images."""
    images = train[0]
    size = size or images.shape[1]
    mean, std = (
        tuple(np.broadcast_to(statistic(images / 255, axis=(0, 1, 2)), 3).tolist())
        for statistic in (np.mean, np.std)
    )
    for_training, for_test = make_transforms(recipe, size, mean, std)
    return Data(Arrays(*train, for_training), Arrays(*test, for_test), classes, size)


def _image_folders(folder: Path | None, recipe: Recipe, size: int | None) -> Data:
    """Folders as ImageNet's: `train`, and `val` or `test`, each with a folder for every class."""
    expected = "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE (or test)"
    if folder is None:
        raise UserError(f"--data: expected {expected}, got none")
    test_folder = folder / ("val" if (folder / "val").is_dir() else "test")
    missing = [str(path) for path in (folder / "train", test_folder) if not path.is_dir()]
    if missing:
        raise UserError(f"--data: expected {expected}; no folder {' nor '.join(missing)}")
    train, test = _image_folder(folder / "train"), _image_folder(test_folder)
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{folder / 'train'} and {test_folder} have different classes; only one of them has "
            f"{first_few(different)}"
        )
    if size is None:
        width, height = train[0][0].size
        size = min(width, height)
    train.transform, test.transform = make_transforms(
        recipe, size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    )
    return Data(train, test, train.classes, size)


def _image_folder(path: Path) -> torchvision_datasets.ImageFolder:
    try:
        data = torchvision_datasets.ImageFolder(path, loader=_open, allow_empty=True)
    except FileNotFoundError as error:  # there is no class folder
        raise UserError(str(error)) from error
    empty = sorted(set(range(len(data.classes))) - set(data.targets))
    if empty:
        raise UserError(
            f"{path / data.classes[empty[0]]} has no images; {len(empty)} of the "
            f"{len(data.classes)} class folders in {path} are empty. Remove or fill them"
        )
    return data


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # raised by PIL's readers
        raise UserError(f"{path} cannot be read as an image: {one_line(error)}") from error


LOADERS: dict[str, Callable[[Path | None, Recipe, int | None], Data]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "imagefolder": _image_folders,
}
