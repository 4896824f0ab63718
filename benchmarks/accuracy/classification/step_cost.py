"""What a training step costs with each attention layer: parameters, memory and time."""

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.common.trainer import autocast
from benchmarks.speed.timing import interleave, quartiles, saved_bytes

from . import datasets, networks
from .optimization import make_optimizer
from .recipes import RECIPES
from .trainer import to_device


def measure(
    names: Sequence[str], options: argparse.Namespace, seconds: float
) -> dict[str, dict[str, Any]]:
    """Measure a training step with each attention layer; the steps are timed in turns.

    Args:
        names (sequence of str): attention layers; times are relative to the first.
        options (Namespace): options of `benchmarks.accuracy.train`.
        seconds (float): how long to time, in all.

    Returns:
        dict of dict: by attention, the figures of the results file.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = datasets.load(options.dataset, options.data, RECIPES[options.recipe], options.input_size)
    items = [data.train[index] for index in range(options.batch_size)]
    batch = to_device(
        torch.stack([image for image, _ in items]),
        torch.tensor([label for _, label in items]),
        device,
        options.channels_last,
    )
    costs: dict[str, dict[str, Any]] = {}
    steps = {}
    for name in names:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model = networks.build(options.model, len(data.classes), name, options.e_lambda)
        model = model.to(device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, options.lr, options.weight_decay, options.momentum)
        steps[name] = partial(training_step, model, optimizer, batch, options.amp)
        costs[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "kept_mb": saved_bytes(steps[name], exclude=model.parameters()) / 1e6,
        }
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[name]()
            costs[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    times = interleave(steps, seconds)
    for name in names:
        ratios = [time / base for time, base in zip(times[name], times[names[0]], strict=True)]
        first, middle, third = quartiles(ratios)
        costs[name] |= {
            "step_ms": 1e3 * median(times[name]),
            "step_ratio": middle,
            "step_ratio_quartiles": [first, third],
        }
    return costs


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], amp: str
) -> None:
    """Forward, backward and update of the weights."""
    images, labels = batch
    with autocast(images.device, amp):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()
