"""Train and evaluate Faster and Mask R-CNN with SimAM in the backbone, by the paper's recipe.

Without arguments: a small Mask R-CNN on drawn shapes. On several devices:
torchrun --nproc-per-node=4 benchmarks/detect.py ...
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import torch

    from benchmarks.accuracy.common.checkpoint import load, write_json
    from benchmarks.accuracy.common.distributed import DistributedContext, distributed_context
    from benchmarks.accuracy.common.options import exit_on_user_error
    from benchmarks.accuracy.common.run import Run, read_checkpoint
    from benchmarks.accuracy.common.sampler import DistributedBatchSampler, seed_everything
    from benchmarks.accuracy.detection import coco, drawing, models, shapes
    from benchmarks.accuracy.detection.dataset import Examples
    from benchmarks.accuracy.detection.evaluation import Figures, detect, score, table
    from benchmarks.accuracy.detection.options import parse
    from benchmarks.accuracy.detection.recipes import RECIPES, Recipe
    from benchmarks.accuracy.detection.trainer import Trainer
except ImportError as missing:
    print(f'detect.py: error: {missing}: pip install "simam[train]"', file=sys.stderr)
    raise SystemExit(2) from None

from simam.cli.models import load_weights
from simam.messages import UserError
from simam.state_dict import some

# What the weights of a detector do not work without; SimAM leaves no trace in them.
OF_THE_WEIGHTS = ("model", "attention", "e_lambda", "channels", "anchor_sizes")
LOGGED = ("AP", "AP50", "AP75")


def run(options: argparse.Namespace) -> Figures | None:
    """Train or evaluate.

    Returns:
        dict: the figures of the evaluation, or of the last epoch; None if none was left to train.

    Raises:
        UserError: what was asked for cannot be done; the message says what to do instead.
    """
    with distributed_context(options.device) as dist_context:
        return evaluate(options, dist_context) if options.evaluate else train(options, dist_context)


def evaluate(options: argparse.Namespace, dist_context: DistributedContext) -> Figures:
    """The figures of a checkpoint, with the detector that it is of."""
    content = load(options.weights)
    settings = content.get("settings", {})
    recipe = RECIPES[options.recipe]
    if "anchor_sizes" in settings:  # else the file is not of a run of this script
        recipe = Recipe(**{name: settings[name] for name in asdict(recipe)})
        for name in set(OF_THE_WEIGHTS) & set(options.numbers):
            asked, was = options.numbers[name], getattr(recipe, name)
            if asked != was:
                raise UserError(
                    f"--{name.replace('_', '-')} {asked}: {options.weights} was trained with "
                    f"{was}; leave the option out"
                )
    recipe = recipe.changed(options.numbers)
    val = read(options, dist_context, recipe, options.splits[1])
    were = settings.get("categories", val.categories)
    if were != val.categories:
        raise UserError(
            f"{options.weights} was trained on {listed(were)}; {val.file} has "
            f"{listed(val.categories)}"
        )
    model = models.build(recipe, len(val.categories))
    load_weights(model, str(options.weights))
    figures = measure(model.to(dist_context.device), val, recipe, dist_context, options)
    if dist_context.is_primary:
        print(f"{table(figures)}\n{options.output / 'evaluation.json'}")
    return figures


def train(options: argparse.Namespace, dist_context: DistributedContext) -> Figures | None:
    """Epoch after epoch, each with its figures, its row in the log and its checkpoint."""
    recipe = RECIPES[options.recipe].changed(options.numbers)
    saved = read_checkpoint(options.output, resume=options.resume)
    splits = [read(options, dist_context, recipe, split) for split in options.splits]
    (classes, val_classes), val = (split.categories for split in splits), splits[1]
    if classes != val_classes:
        raise UserError(
            f"{splits[0].file} has {listed(classes)}, {val.file} has {listed(val_classes)}; "
            "expected the same in both"
        )
    trainer = prepare(options, dist_context, recipe, splits[0], go_on=saved is not None)
    settings = asdict(recipe) | {
        "amp": options.amp,
        "seed": options.seed,
        "backbone_weights": options.backbone_weights and str(options.backbone_weights),
        "categories": classes,
        "annotations": splits[0].digest,
        "images_at_once": trainer.batches.micro_batch_size,  # padded and normalised together
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
    figures = None
    while len(run.rows) < recipe.epochs:
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": len(run.rows) + 1} | trainer.epoch()
        row["lr"] = trainer.optimizer.param_groups[0]["lr"]
        done = row["epoch"] == recipe.epochs
        figures = measure(trainer.model, val, recipe, dist_context, options, picture=done)
        row |= {f"{kind} {name}": found[name] for kind, found in figures.items() for name in LOGGED}
        row |= {"steps": trainer.step, "seconds": round(time.perf_counter() - start, 2)}
        run.add(row)
        if dist_context.is_primary:
            print_row(row)
    run.close()
    if dist_context.is_primary:
        print(closing(run.rows, options.output))
    return figures


def prepare(
    options: argparse.Namespace,
    dist_context: DistributedContext,
    recipe: Recipe,
    split: coco.Split,
    *,
    go_on: bool,
) -> Trainer:
    """A detector before its first step; one that goes on gets its weights later."""
    seed_everything(options.seed)
    model = models.build(recipe, len(split.categories))
    if options.backbone_weights and not go_on:
        models.load_backbone(model, options.backbone_weights, recipe)
    data = Examples(split, masks=recipe.masks, flip=recipe.flip)
    parts = dist_context.world_size * options.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"--batch-size {recipe.batch_size}: expected a multiple of {parts}, which is "
            f"{dist_context.world_size} processes times --accumulate {options.accumulate}"
        )
    if recipe.batch_size > len(data):
        raise UserError(
            f"--batch-size {recipe.batch_size}: expected at most {len(data)}, as many as there "
            f"are images with objects in {split.file}"
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


def read(
    options: argparse.Namespace, dist_context: DistributedContext, recipe: Recipe, split: str
) -> coco.Split:
    """The annotations of a split; the shapes are drawn if they are asked for and not there."""
    if options.shapes and dist_context.is_primary:
        shapes.write(options.data)
    dist_context.barrier()
    found = coco.read(options.data, split, masks=recipe.masks)
    if found.left_out and dist_context.is_primary:
        print(f"detect.py: warning: {found.file}: left out {found.left_out}", file=sys.stderr)
    return found


def measure(
    model: torch.nn.Module,
    val: coco.Split,
    recipe: Recipe,
    dist_context: DistributedContext,
    options: argparse.Namespace,
    *,
    picture: bool = True,
) -> Figures:
    """All figures of a detector, and the files that show them."""
    detections = detect(model, val, dist_context, workers=options.workers)
    figures = score(val, detections, masks=recipe.masks)
    if dist_context.is_primary:
        write_json(figures, options.output / "evaluation.json")
    if dist_context.is_primary and picture:
        drawing.draw(val, detections, options.output / "detections.png")
    return figures


def listed(categories: dict[int, str]) -> str:
    """Categories in a few words."""
    return f"{len(categories)} categories ({some([f'{i} {n}' for i, n in categories.items()])})"


def print_row(row: dict[str, Any]) -> None:
    """One epoch in one line."""
    line = f"epoch {row['epoch']:3}   lr {row['lr']:.5f}   loss {row['loss']:.3f}"
    for name in ("box AP", "mask AP"):
        line += f"   {name} {row[name]:.3f}" if name in row else ""
    print(f"{line}   {row['seconds']:.0f} s", flush=True)


def closing(rows: list[dict[str, Any]], output: Path) -> str:
    """What came of a run."""
    changes = [
        f"{name} {rows[0][name]:.3f} after epoch 1, {rows[-1][name]:.3f} after epoch {len(rows)}, "
        f"{max(row[name] for row in rows):.3f} at best"
        for name in ("box AP", "mask AP")
        if name in rows[0]
    ]
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{'; '.join(changes)}; {minutes:.1f} minutes; see {output}"


def main() -> None:
    """Train or evaluate; say in one line what cannot be done."""
    with exit_on_user_error("detect.py"):
        run(parse(__doc__.partition("\n\n")[0]))


if __name__ == "__main__":
    main()
