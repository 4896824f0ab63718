"""Trains or evaluates a detector as the options of `benchmarks.accuracy.detect` say."""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.accuracy.common.checkpoint import load, write_json
from benchmarks.accuracy.common.distributed import DistributedContext, distributed_context
from benchmarks.accuracy.common.run import Run, read_checkpoint
from benchmarks.accuracy.common.sampler import DistributedBatchSampler, seed_everything
from simam.cli.models import load_weights
from simam.messages import UserError, first_few

from . import coco, drawing, models, shapes
from .dataset import TrainingDataset
from .evaluation import Metrics, detect, metrics_table, score
from .options import PROG
from .recipes import RECIPES, Recipe
from .trainer import Trainer

# Recipe fields that must be as in the training of a checkpoint. Its weights also load with another
# attention or e_lambda, since SimAM adds nothing to a state dict, but the outputs would differ.
CHECKPOINT_FIELDS = ("model", "attention", "e_lambda", "channels", "anchor_sizes")
LOGGED_METRICS = ("AP", "AP50", "AP75")


def run(options: argparse.Namespace) -> Metrics | None:
    """Train or evaluate.

    Returns:
        dict: the metrics of the evaluation or of the last epoch; None if no epoch was left to
            train.

    Raises:
        UserError: the request cannot be carried out; the message says what to do instead.
    """
    with distributed_context(options.device) as dist_context:
        if options.evaluate:
            return evaluate_checkpoint(options, dist_context)
        return train(options, dist_context)


def evaluate_checkpoint(options: argparse.Namespace, dist_context: DistributedContext) -> Metrics:
    """Evaluate a checkpoint with the detector that its settings describe."""
    content = load(options.weights)
    settings = content.get("settings", {})
    recipe = RECIPES[options.recipe]
    if "anchor_sizes" in settings:  # else the file is not from a run of this script
        recipe = Recipe(**{name: settings[name] for name in asdict(recipe)})
        for name in set(CHECKPOINT_FIELDS) & set(options.overrides):
            given, trained = options.overrides[name], getattr(recipe, name)
            if given != trained:
                raise UserError(
                    f"--{name.replace('_', '-')} {given}: {options.weights} was trained with "
                    f"{trained}; leave the option out"
                )
    recipe = recipe.override(options.overrides)
    val = read_split(options, dist_context, recipe, options.splits[1])
    trained_on = settings.get("categories", val.categories)
    if trained_on != val.categories:
        raise UserError(
            f"{options.weights} was trained on {describe_categories(trained_on)}; {val.file} has "
            f"{describe_categories(val.categories)}"
        )
    model = models.build(recipe, len(val.categories))
    load_weights(model, str(options.weights))
    metrics = evaluate_model(model.to(dist_context.device), val, recipe, dist_context, options)
    if dist_context.is_primary:
        print(f"{metrics_table(metrics)}\n{options.output / 'evaluation.json'}")
    return metrics


def train(options: argparse.Namespace, dist_context: DistributedContext) -> Metrics | None:
    """Train epoch by epoch; each ends with an evaluation, a row of the log and a checkpoint."""
    recipe = RECIPES[options.recipe].override(options.overrides)
    saved = read_checkpoint(options.output, resume=options.resume)
    train_split, val = (read_split(options, dist_context, recipe, s) for s in options.splits)
    if train_split.categories != val.categories:
        raise UserError(
            f"{train_split.file} has {describe_categories(train_split.categories)}, {val.file} has "
            f"{describe_categories(val.categories)}; expected the same in both"
        )
    trainer = build_trainer(options, dist_context, recipe, train_split, resume=saved is not None)
    settings = asdict(recipe) | {
        "amp": options.amp,
        "seed": options.seed,
        "backbone_weights": options.backbone_weights and str(options.backbone_weights),
        "categories": train_split.categories,
        "annotations": train_split.digest,
        # Images of a micro-batch are padded to one size and share batch-norm statistics.
        "micro_batch_size": trainer.batches.micro_batch_size,
    }
    kinds = ("box", "mask") if recipe.masks else ("box",)
    run = Run(
        options.output,
        trainer,
        settings,
        saved,
        best="box AP",
        curves={"loss": ("loss",), "AP": tuple(f"{kind} AP" for kind in kinds)},
        tensorboard=options.tensorboard,
    )
    metrics = None
    while len(run.rows) < recipe.epochs:
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": len(run.rows) + 1} | trainer.epoch()
        row["lr"] = trainer.optimizer.param_groups[0]["lr"]
        is_last = row["epoch"] == recipe.epochs
        metrics = evaluate_model(trainer.model, val, recipe, dist_context, options, draw=is_last)
        for kind, values in metrics.items():
            row |= {f"{kind} {name}": values[name] for name in LOGGED_METRICS}
        row |= {"steps": trainer.step, "seconds": round(time.perf_counter() - start, 2)}
        run.add(row)
        if dist_context.is_primary:
            print_row(row)
    run.close()
    if dist_context.is_primary:
        print(summary(run.rows, options.output))
    return metrics


def build_trainer(
    options: argparse.Namespace,
    dist_context: DistributedContext,
    recipe: Recipe,
    split: coco.Split,
    *,
    resume: bool,
) -> Trainer:
    """Build a detector and its trainer; a resumed run restores the weights afterwards."""
    seed_everything(options.seed)
    model = models.build(recipe, len(split.categories))
    if options.backbone_weights and not resume:
        models.load_backbone(model, options.backbone_weights, recipe)
    data = TrainingDataset(split, masks=recipe.masks, flip=recipe.flip)
    micro_batches = dist_context.world_size * options.accumulate
    if recipe.batch_size % micro_batches:
        raise UserError(
            f"--batch-size {recipe.batch_size}: expected a multiple of {micro_batches}, which is "
            f"{dist_context.world_size} processes times --accumulate {options.accumulate}"
        )
    if recipe.batch_size > len(data):
        raise UserError(
            f"--batch-size {recipe.batch_size}: expected at most {len(data)}, the number of "
            f"images with objects in {split.file}"
        )
    batches = DistributedBatchSampler(
        len(data),
        recipe.batch_size,
        options.seed,
        rank=dist_context.rank,
        world_size=dist_context.world_size,
        accumulation_steps=options.accumulate,
    )
    model = model.to(dist_context.device)
    return Trainer(
        model, recipe, dist_context, data, batches, amp=options.amp, workers=options.workers
    )


def read_split(
    options: argparse.Namespace, dist_context: DistributedContext, recipe: Recipe, name: str
) -> coco.Split:
    """Read the annotations of a split; without --data, draw the shapes first, unless they exist."""
    if options.shapes and dist_context.is_primary:
        shapes.write(options.data)
    dist_context.barrier()
    split = coco.read(options.data, name, masks=recipe.masks)
    if split.skipped and dist_context.is_primary:
        print(f"{PROG}: warning: {split.file}: skipped {split.skipped}", file=sys.stderr)
    return split


def evaluate_model(
    model: nn.Module,
    val: coco.Split,
    recipe: Recipe,
    dist_context: DistributedContext,
    options: argparse.Namespace,
    *,
    draw: bool = True,
) -> Metrics:
    """Compute all metrics of a detector; write evaluation.json and, if asked, detections.png."""
    detections = detect(model, val, dist_context, workers=options.workers)
    metrics = score(val, detections, masks=recipe.masks)
    if dist_context.is_primary:
        write_json(metrics, options.output / "evaluation.json")
    if dist_context.is_primary and draw:
        drawing.draw(val, detections, options.output / "detections.png")
    return metrics


def describe_categories(categories: dict[int, str]) -> str:
    """Count categories and list the first ones."""
    names = [f"{number} {name}" for number, name in categories.items()]
    return f"{len(categories)} categories ({first_few(names)})"


def print_row(row: dict[str, Any]) -> None:
    """Print an epoch in one line."""
    line = f"epoch {row['epoch']:3}   lr {row['lr']:.5f}   loss {row['loss']:.3f}"
    for name in ("box AP", "mask AP"):
        line += f"   {name} {row[name]:.3f}" if name in row else ""
    print(f"{line}   {row['seconds']:.0f} s", flush=True)


def summary(rows: list[dict[str, Any]], output: Path) -> str:
    """Summarise a run in one line."""
    changes = [
        f"{name} {rows[0][name]:.3f} after epoch 1, {rows[-1][name]:.3f} after epoch {len(rows)}, "
        f"{max(row[name] for row in rows):.3f} at best"
        for name in ("box AP", "mask AP")
        if name in rows[0]
    ]
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{'; '.join(changes)}; {minutes:.1f} minutes; see {output}"
