"""Make a pretrained network usable after attach: batch-norm statistics of what it computes now."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from operator import length_hint
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from .placement import check_module

Model = TypeVar("Model", bound=nn.Module)
Group: TypeAlias = Any  # dist.ProcessGroup, which a torch without distributed lacks


def recalibrate(
    model: Model,
    loader: Iterable[Any],
    *,
    device: torch.device | str | int | None = None,
    max_batches: int | None = None,
    reference: nn.Module | None = None,
) -> Model:
    """Re-estimate the running statistics of every batch norm, in place, without training.

    After `attach` every batch norm sees other inputs than those its statistics were collected
    on, and a pretrained network collapses. Some hundred images without labels, prepared as for
    evaluation, bring a part of its accuracy back. No parameter changes.

    The new mean and variance are the averages, over the batches, of each batch's own mean and
    unbiased variance; every batch counts the same. In the pass each batch norm normalises with
    the statistics of the batch, as in training, while all else (dropout, stochastic depth) works
    as in evaluation. Batches should therefore be mixed, and not small: 32 images or more.

    Batch norms that are in eval mode or have frozen parameters take part. Those that keep no
    running statistics, or that the pass does not reach, stay as they are, and so do
    `FrozenBatchNorm2d`. Modes and momenta are restored. On an error the statistics are, too.

    In `DistributedDataParallel` every process calls this with its own part of the images; all
    get the average over the batches of all. Any other model is this process's own affair.

    With a `reference`, the network as it was trained, the statistics of its training are kept, and
    changed by as much as SimAM changes those of these images: a copy of it is measured too, the
    difference of the means is added, and the variances are multiplied by their ratio, the norm's
    eps included. Measured on one network that was better by four points of a hundred with
    `e_lambda=0.1`, and no better with 1e-4.

    Args:
        model (nn.Module): the network, called as `model(images)`.
        loader (iterable): batches, each one a Tensor[N, C, *spatial], a tuple or list that
            starts with it, or a dict in which it is the only such floating-point tensor.
        device (torch.device, str or int, optional): where to move the batches; by default
            where the first batch norm is.
        max_batches (int, optional): stop after this many batches of the loader.
        reference (nn.Module, optional): the same network without SimAM, unchanged since its
            training, on the same device; it is left as it is. The loader is gone through twice.

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError: model is not a module, or loader or a batch is not as above.
        ValueError: the model has no batch norm with running statistics, or is lazy and not yet
            initialised; the loader gave no batch; max_batches is not a positive integer; or the
            reference has other batch norms, or comes with a loader that can be used only once.
        RuntimeError: another process failed.

    Source:
        `torch.optim.swa_utils.update_bn`, which sets the whole model to train mode, and leaves
        it half changed when the loader raises.

    Examples:
        >>> norm = nn.BatchNorm2d(1)
        >>> batches = [torch.full((2, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 6.0)]
        >>> recalibrate(norm, batches).running_mean
        tensor([4.5000])
    """
    check_module(model)
    _check_options(loader, max_batches)
    network: nn.Module = model
    group = None
    if isinstance(model, DistributedDataParallel):
        # Its own forward waits for all processes, which may have different numbers of batches.
        network, group = model.module, model.process_group
    norms = _find_norms(network)
    trained = {} if reference is None else _trained_norms(reference, norms, loader)
    where = next(iter(norms.values())).running_mean.device

    def measure(network: nn.Module, norms: Collection[Any]) -> None:
        with _all_or_none(group, where):
            batches = _progress(loader, max_batches, group)
            images = (
                _images_of(batch).to(where if device is None else device) for batch in batches
            )
            update_bn(images, _InItsModes(network))
        if group is not None:
            for norm in norms:
                _average(norm, group)
        if not any(norm.num_batches_tracked for norm in norms):
            raise ValueError(
                "expected at least one batch that reaches a batch norm, got none: is the loader "
                "empty, or an iterator that has been used up?"
            )

    with _borrowed(model, norms.values()) as before:
        measure(network, norms.values())
        if reference is not None:
            plain = copy.deepcopy(reference)
            plain_norms = _find_norms(plain)
            with _borrowed(plain, plain_norms.values()):
                measure(plain, plain_norms.values())
            for name, norm in norms.items():
                _shift(norm, trained[name], plain_norms[name])
        for norm in norms.values():
            if not norm.num_batches_tracked:
                _write(norm, before[norm])
    return model


class _InItsModes(nn.Module):
    """Runs a network in the modes its modules are in, which `update_bn` would change."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> "_InItsModes":
        return self

    def forward(self, images: Tensor) -> None:
        self.network(images)


@contextmanager
def _borrowed(model: nn.Module, norms: Collection[Any]) -> Iterator[dict[Any, list[Tensor]]]:
    """The model with its batch norms alone in train mode; yields their statistics from before."""
    modes = {module: module.training for module in model.modules()}
    # update_bn also changes that of batch norms without running statistics.
    momenta = {norm: norm.momentum for norm in modes if isinstance(norm, _BatchNorm)}
    before = {norm: [buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms}
    try:
        for module in modes:
            module.training = module in before
        yield before
    except BaseException:
        for norm, buffers in before.items():
            _write(norm, buffers)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _write(norm: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(norm.buffers(recurse=False), values, strict=True):
        buffer.copy_(value)


def _shift(attached: Any, trained: Any, plain: Any) -> None:
    """Trained statistics, changed as much as those of the plain network are in the attached one."""
    attached.running_mean += trained.running_mean - plain.running_mean
    # With eps, since a channel that is dead in these images has no variance.
    ratio = (attached.running_var + attached.eps) / (plain.running_var + plain.eps)
    attached.running_var.copy_((trained.running_var + trained.eps) * ratio - attached.eps)


@contextmanager
def _all_or_none(group: Group | None, device: torch.device) -> Iterator[None]:
    """Raises in every process where the body raises in one, which would leave others waiting."""
    failures = torch.ones((), device=device)
    try:
        yield
        failures.zero_()
    finally:
        if group is not None:
            dist.all_reduce(failures, group=group)
    if failures:
        raise RuntimeError(
            "recalibrate failed in another process, which raises the cause; the statistics are "
            "unchanged in all of them"
        )


def _average(norm: Any, group: Group) -> None:
    """Averages statistics over the batches of all processes."""
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    weight = batches.double().expand_as(mean)
    total = torch.stack([mean * weight, variance * weight, weight])
    dist.all_reduce(total, group=group)
    mean.copy_(total[0] / total[2])
    variance.copy_(total[1] / total[2])
    batches.copy_(total[2, 0])


def _progress(loader: Iterable[Any], max_batches: int | None, group: Group | None) -> Iterable[Any]:
    """The batches to take, with a bar on the stderr of the first process if it is a terminal."""
    batches = islice(loader, max_batches)
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with the extra of the models, and nothing depends on it
        return batches
    total = length_hint(loader) or None
    if total and max_batches:
        total = min(total, max_batches)
    quiet = True if group is not None and dist.get_rank(group) else None
    bar: Iterable[Any] = tqdm(
        batches, "recalibrate", total, unit="batch", disable=quiet, leave=False
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
        f"with just one, got a {got}; pick them yourself: "
        "recalibrate(model, (pick(batch) for batch in loader))"
    )


def _find_norms(model: nn.Module) -> dict[str, Any]:
    lazy = [name for name, tensor in model.named_parameters() if is_lazy(tensor)]
    lazy += [name for name, tensor in model.named_buffers() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"the model is lazy and not yet initialised, at {lazy[0]}; run it once before"
        )
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    }
    if norms:
        return norms
    leaves = (module for module in model.modules() if not list(module.children()))
    kinds = sorted({type(m).__name__ for m in leaves if "Norm" in type(m).__name__})
    raise ValueError(
        "recalibrate does not apply: expected batch norms with running statistics, got "
        f"{', '.join(kinds) or 'no norm'}. Layer, group and instance norms measure "
        "every input anew, so a model with them needs fine-tuning alone. FrozenBatchNorm2d must "
        "be made a BatchNorm2d first, for example with timm.layers.unfreeze_batch_norm_2d"
    )


def _trained_norms(
    reference: nn.Module, norms: dict[str, Any], loader: Iterable[Any]
) -> dict[str, Any]:
    check_module(reference)
    if isinstance(loader, Iterator):
        raise ValueError(
            "reference= goes through the loader twice, which an iterator does not allow; give a "
            "list or a DataLoader"
        )
    trained = _find_norms(reference)
    ours, theirs = (
        {(name, norm.num_features, norm.running_mean.device) for name, norm in each.items()}
        for each in (norms, trained)
    )
    wrong = sorted({name for name, *_ in ours ^ theirs})
    if wrong:
        raise ValueError(
            "reference must be the same network without SimAM, on the same device and not wrapped; "
            f"its batch norms differ at {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        )
    return trained


def _check_options(loader: object, max_batches: object) -> None:
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader must be an iterable of batches, got {type(loader).__name__}; "
            "for one tensor of images write images.split(32)"
        )
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ValueError(
            f"max_batches must be an integer from 1, or None for all batches, got {max_batches!r}"
        )
