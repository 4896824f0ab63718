"""Trains or evaluates a classifier as the options of `benchmarks.accuracy.train` say."""

import argparse
import os
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import simam
from benchmarks.accuracy.common.distributed import DistributedContext, distributed_context
from benchmarks.accuracy.common.run import Run, read_checkpoint
from benchmarks.accuracy.common.sampler import DistributedBatchSampler
from simam.cli.models import load_weights
from simam.messages import UserError, one_line

from . import datasets, networks
from .datasets import Data, LabelledImages
from .optimization import make_optimizer, make_scheduler
from .options import RECIPE_FIELDS
from .recipes import RECIPES, Recipe
from .trainer import Trainer, evaluate

# Options that may differ when a run is resumed; all others are part of its settings.
RESUMABLE_OPTIONS = {
    "output",
    "resume",
    "workers",
    "device",
    "data",
    "tensorboard",
    "evaluate",
    "accumulate",
}
CURVES = {"loss": ("train_loss", "loss"), "accuracy in percent": ("train_top1", "top1")}
EMA_CURVES = {"average of the weights": ("top1", "ema_top1")}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate.

    Returns:
        dict: the last row of the run's log; for an evaluation loss, top1 and top5.

    Raises:
        UserError: the request cannot be carried out; the message says what to do instead.
    """
    with distributed_context(options.device) as dist_context:
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
            torch.use_deterministic_algorithms(True)
        recipe = replace(RECIPES[options.recipe], **{n: vars(options)[n] for n in RECIPE_FIELDS})
        data = datasets.load(options.dataset, options.data, recipe)
        model = build(options, len(data.classes))
        check_input_size(model, data, options)
        model = model.to(dist_context.device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if options.compile:
            model.compile()
        if options.evaluate:
            return _evaluate(model, data.test, dist_context, options)
        saved = read_checkpoint(options.output, resume=options.resume)
        batches = _batches(len(data.train), dist_context, options)
        total_steps = recipe.total_steps(batches.steps_per_epoch, options.epochs)
        trainer = _trainer(model, data, batches, total_steps, dist_context, recipe, options)
        return _train(trainer, total_steps, data.test, saved, options)


def build(options: argparse.Namespace, num_classes: int) -> nn.Module:
    """Build the network of the options and load the weights that they name."""
    model = networks.build(
        options.model, num_classes, options.attention, options.e_lambda, options.seed
    )
    if options.weights and options.attention == "simam":
        try:
            simam.load_checkpoint(model, options.weights)
        except (OSError, ValueError) as error:
            raise UserError(f"--weights: {error}") from error
    elif options.weights:
        load_weights(model, str(options.weights))
    return model


def check_input_size(model: nn.Module, data: Data, options: argparse.Namespace) -> None:
    """Reject images of a size that the network cannot take, before it is trained."""
    image = data.test[0][0]
    try:
        with torch.no_grad():
            model.eval()(image[None])
    except Exception as error:  # each network has its own error
        raise UserError(
            f"{options.model} cannot take images of {image.shape[1]} x {image.shape[2]}: "
            f"{one_line(error)}; give another --input-size, or another --model"
        ) from error


def _batches(
    images: int, dist_context: DistributedContext, options: argparse.Namespace
) -> DistributedBatchSampler:
    micro_batches = dist_context.world_size * options.accumulate
    if options.batch_size % micro_batches:
        raise UserError(
            f"--batch-size {options.batch_size}: expected a multiple of {micro_batches}, which is "
            f"{dist_context.world_size} processes times --accumulate {options.accumulate}"
        )
    if options.batch_size > images:
        raise UserError(
            f"--batch-size {options.batch_size}: expected at most {images}, the number of "
            "training images"
        )
    return DistributedBatchSampler(
        images,
        options.batch_size,
        options.seed,
        rank=dist_context.rank,
        world_size=dist_context.world_size,
        accumulation_steps=options.accumulate,
    )


def _trainer(
    model: nn.Module,
    data: Data,
    batches: DistributedBatchSampler,
    total_steps: int,
    dist_context: DistributedContext,
    recipe: Recipe,
    options: argparse.Namespace,
) -> Trainer:
    optimizer = make_optimizer(model, options.lr, options.weight_decay, options.momentum)
    return Trainer(
        model,
        optimizer,
        make_scheduler(optimizer, recipe, total_steps),
        dist_context,
        data.train,
        batches,
        amp=options.amp,
        channels_last=options.channels_last,
        ema=options.ema,
        workers=options.workers,
    )


def _train(
    trainer: Trainer,
    total_steps: int,
    test: LabelledImages,
    saved: dict[str, Any] | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train epoch by epoch, each with its log row and its checkpoint; return the last row."""
    dist_context = trainer.dist_context
    settings = {k: v for k, v in vars(options).items() if k not in RESUMABLE_OPTIONS}
    settings |= {"weights": options.weights and str(options.weights)}
    settings |= {"images_of_a_norm": trainer.batches.micro_batch_size}
    run = Run(
        options.output,
        trainer,
        settings,
        saved,
        best="top1",
        curves=CURVES | (EMA_CURVES if trainer.ema else {}),
        tensorboard=options.tensorboard,
    )
    while trainer.step < total_steps:
        start = time.perf_counter()
        lr = trainer.optimizer.param_groups[0]["lr"]
        row: dict[str, Any] = {"epoch": len(run.rows) + 1, "lr": lr}
        row |= trainer.epoch(len(run.rows), total_steps)
        row |= _score(trainer.model, test, dist_context, options)
        if trainer.ema:
            scores = _score(trainer.ema.module, test, dist_context, options)
            row |= {f"ema_{name}": value for name, value in scores.items()}
        row |= {"steps": trainer.step, "seconds": round(time.perf_counter() - start, 2)}
        run.add(row)
        if dist_context.is_primary:
            _print_row(row)
    run.close()
    last, best = run.rows[-1], max(row["top1"] for row in run.rows)
    if dist_context.is_primary:
        print(f"top-1 {last['top1']:.2f} %, best {best:.2f} %; see {options.output}")
    return last


def _evaluate(
    model: nn.Module,
    test: LabelledImages,
    dist_context: DistributedContext,
    options: argparse.Namespace,
) -> dict[str, float]:
    scores = _score(model, test, dist_context, options)
    if dist_context.is_primary:
        top1, top5, loss = (scores[name] for name in ("top1", "top5", "loss"))
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}")
    return scores


def _score(
    model: nn.Module,
    test: LabelledImages,
    dist_context: DistributedContext,
    options: argparse.Namespace,
) -> dict[str, float]:
    """`evaluate` with the options of the command line."""
    return evaluate(
        model,
        test,
        dist_context,
        batch_size=max(1, options.batch_size // dist_context.world_size),
        amp=options.amp,
        channels_last=options.channels_last,
        workers=options.workers,
    )


def _print_row(row: dict[str, Any]) -> None:
    line = f"epoch {row['epoch']:3}   lr {row['lr']:.4f}   train {row['train_loss']:.3f}"
    line += f"   test {row['loss']:.3f}   top-1 {row['top1']:6.2f} %"
    if "ema_top1" in row:
        line += f"   average {row['ema_top1']:6.2f} %"
    print(f"{line}   {row['seconds']:.0f} s", flush=True)
