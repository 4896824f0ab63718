"""Batches of images from whatever a data loader yields, with a progress bar."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor


def check_loader(loader: object, max_batches: object) -> None:
    """Reject a loader that is not an iterable of batches, and a limit that is not a count."""
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader must be an iterable of batches, got {type(loader).__name__}; "
            "for one tensor of images pass images.split(32)"
        )
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(
            f"max_batches must be a positive integer, or None for all batches, got {max_batches!r}"
        )


def image_batches(
    loader: Iterable[Any],
    max_batches: int | None,
    device: torch.device | str | int,
    show_progress: bool,
) -> Iterator[Tensor]:
    """Yield the images of each batch on the device, up to `max_batches`.

    Raises:
        TypeError: a batch is not a tensor, a tuple or list that starts with a tensor, or a dict
            that holds exactly one floating-point tensor with spatial dimensions.
    """
    limited = _with_progress_bar if show_progress else islice
    for batch in limited(loader, max_batches):
        yield _images_of(batch).to(device)


def _with_progress_bar(loader: Iterable[Any], max_batches: int | None) -> Iterable[Any]:
    """Show progress on stderr, if stderr is a terminal and tqdm, which is optional, is there."""
    batches = islice(loader, max_batches)
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    total = length_hint(loader) or None
    if total and max_batches:
        total = min(total, max_batches)
    bar: Iterable[Any] = tqdm(
        batches, "recalibrate", total, unit="batch", disable=None, leave=False
    )
    return bar


def _images_of(batch: Any) -> Tensor:
    images, got = batch, type(batch).__name__
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        maps = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 2]
        images = maps[0] if len(maps) == 1 else None
        got += f" of {', '.join(map(str, batch))}"
    elif isinstance(batch, (list, tuple)):
        images = batch[0] if batch else None
    if isinstance(images, Tensor):
        return images
    raise TypeError(
        "every batch must be a tensor of images, a tuple or list that starts with one, or a dict "
        f"with exactly one, got a {got}; select the images yourself: "
        "recalibrate(model, (select(batch) for batch in loader))"
    )
