"""Train a network with SimAM, another attention, or none, by the paper's recipes.

Without arguments: a small network on scikit-learn's digits. On several devices:
torchrun --nproc-per-node=4 benchmarks/train.py ...
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import torch

    from benchmarks.accuracy.classification import datasets, networks
    from benchmarks.accuracy.classification.recipes import RECIPES, length, optimizer, schedule
    from benchmarks.accuracy.classification.trainer import Trainer, evaluate
    from benchmarks.accuracy.common.distributed import DistributedContext, distributed_context
    from benchmarks.accuracy.common.options import add_run_options, exit_on_user_error, positive_int
    from benchmarks.accuracy.common.run import Run, read_checkpoint
    from benchmarks.accuracy.common.sampler import DistributedBatchSampler
except ImportError as missing:
    print(f'train.py: error: {missing}: pip install "simam[train]"', file=sys.stderr)
    raise SystemExit(2) from None

import simam
from simam.cli.models import load_weights
from simam.messages import UserError, one_line

# What a run may change when it goes on.
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
RECIPE_FIELDS = ("model", "e_lambda", "batch_size", "lr", "weight_decay", "momentum", "input_size")
CURVES = {"loss": ("train_loss", "loss"), "accuracy in percent": ("train_top1", "top1")}
AVERAGED = {"average of the weights": ("top1", "ema_top1")}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the numbers of the recipe where none are given."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Options without a default take the recipe's number: see docs/training.md.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--dataset", choices=datasets.DATASETS, default="digits")
    what.add_argument("--data", type=Path, help="folder of the dataset")
    what.add_argument("--model", help="cifar_NAME, or a name of torchvision or timm")
    what.add_argument("--attention", choices=networks.ATTENTION, default="simam")
    what.add_argument("--e-lambda", type=float, help="of SimAM")
    what.add_argument("--weights", type=Path, help="file of weights to start from or to evaluate")
    how = parser.add_argument_group("how")
    how.add_argument("--recipe", choices=RECIPES, default="small", help="default: small")
    how.add_argument("--epochs", type=positive_int, help="milestones keep their share of them")
    how.add_argument("--batch-size", type=positive_int, help="images of a step, on all devices")
    how.add_argument("--accumulate", type=positive_int, default=1, help="turns that a step takes")
    how.add_argument("--lr", type=float, help="learning rate at the start")
    how.add_argument("--momentum", type=float, help="of SGD")
    how.add_argument("--weight-decay", type=float)
    how.add_argument("--input-size", type=positive_int, help="side of what the network sees")
    how.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, too")
    how.add_argument("--seed", type=int, default=0, help="default: 0")
    where = add_run_options(parser)
    where.add_argument("--channels-last", action="store_true", help="layout of the images")
    where.add_argument("--compile", action="store_true", help="use torch.compile")
    where.add_argument("--deterministic", action="store_true", help="on GPUs: exact, but slower")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.recipe]
    for name in RECIPE_FIELDS:
        if getattr(options, name) is None:
            setattr(options, name, getattr(recipe, name))
    if options.workers is None:
        options.workers = 0 if options.dataset == "digits" else 4 * torch.cuda.is_available()
    if options.output is None:
        name = f"{options.dataset}-{options.model}-{options.attention}-seed{options.seed}"
        options.output = Path("runs") / name.replace("/", "-")
    if options.evaluate and not options.weights:
        parser.error("--evaluate: expected --weights FILE, got none")
    if options.resume and options.evaluate:
        parser.error("--resume and --evaluate: expected one of them")
    return options


def build(options: argparse.Namespace, classes: int) -> torch.nn.Module:
    """The network of the options, with the weights that they name."""
    model = networks.build(
        options.model, classes, options.attention, options.e_lambda, options.seed
    )
    if options.weights and options.attention == "simam":
        try:
            simam.load_checkpoint(model, options.weights)
        except (OSError, ValueError) as error:
            raise UserError(f"--weights: {error}") from error
    elif options.weights:
        load_weights(model, str(options.weights))
    return model


def check(model: torch.nn.Module, data: datasets.Data, options: argparse.Namespace) -> None:
    """Refuse images that the network cannot take, before it is trained."""
    image = data.test[0][0]
    try:
        with torch.no_grad():
            model.eval()(image[None])
    except Exception as error:  # networks refuse a size in many ways
        raise UserError(
            f"{options.model} cannot take images of {image.shape[1]} x {image.shape[2]}: "
            f"{one_line(error)}; give another --input-size, or another --model"
        ) from error


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate.

    Returns:
        dict: the last row of the run's log; for an evaluation loss, top1 and top5.

    Raises:
        UserError: what was asked for cannot be done; the message says what to do instead.
    """
    with distributed_context(options.device) as dist_context:
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        recipe = replace(RECIPES[options.recipe], **{n: vars(options)[n] for n in RECIPE_FIELDS})
        data = datasets.load(options.dataset, options.data, recipe)
        model = build(options, len(data.classes))
        check(model, data, options)
        model = model.to(dist_context.device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if options.compile:
            model.compile()
        if options.evaluate:
            return _evaluate(model, data.test, dist_context, options)
        saved = read_checkpoint(options.output, resume=options.resume)
        part = dist_context.world_size * options.accumulate
        if options.batch_size % part:
            raise UserError(
                f"--batch-size {options.batch_size}: expected a multiple of {part}, which is "
                f"{dist_context.world_size} processes times --accumulate {options.accumulate}"
            )
        if options.batch_size > len(data.train):
            raise UserError(
                f"--batch-size {options.batch_size}: expected at most the {len(data.train)} "
                "images that are trained on"
            )
        batches = DistributedBatchSampler(
            len(data.train),
            options.batch_size,
            options.seed,
            rank=dist_context.rank,
            world_size=dist_context.world_size,
            accumulation_steps=options.accumulate,
        )
        steps = length(recipe, batches.steps_per_epoch, options.epochs)
        sgd = optimizer(model, options.lr, options.weight_decay, options.momentum)
        trainer = Trainer(
            model,
            sgd,
            schedule(sgd, recipe, steps),
            dist_context,
            data.train,
            batches,
            amp=options.amp,
            channels_last=options.channels_last,
            ema=options.ema,
            workers=options.workers,
        )
        return _train(trainer, steps, data.test, saved, options)


def _train(
    trainer: Trainer,
    steps: int,
    test: torch.utils.data.Dataset,
    saved: dict[str, Any] | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Epoch after epoch, each with its row in the log and its checkpoint."""
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
        curves=CURVES | (AVERAGED if trainer.ema else {}),
        tensorboard=options.tensorboard,
    )
    while trainer.step < steps:
        start = time.perf_counter()
        lr = trainer.optimizer.param_groups[0]["lr"]
        row: dict[str, Any] = {"epoch": len(run.rows) + 1, "lr": lr}
        row |= trainer.epoch(len(run.rows), steps)
        row |= _score(trainer.model, test, dist_context, options)
        if trainer.ema:
            found = _score(trainer.ema.module, test, dist_context, options)
            row |= {f"ema_{name}": value for name, value in found.items()}
        row |= {"steps": trainer.step, "seconds": round(time.perf_counter() - start, 2)}
        run.add(row)
        if dist_context.is_primary:
            _print_row(row)
    run.close()
    last, best = run.rows[-1], max(row["top1"] for row in run.rows)
    if dist_context.is_primary:
        print(f"top-1 {last['top1']:.2f} %, best {best:.2f} %; see {options.output}")
    return last


def _score(
    model: torch.nn.Module,
    data: torch.utils.data.Dataset,
    dist_context: DistributedContext,
    options: argparse.Namespace,
) -> dict[str, float]:
    return evaluate(
        model,
        data,
        dist_context,
        batch=max(1, options.batch_size // dist_context.world_size),
        amp=options.amp,
        channels_last=options.channels_last,
        workers=options.workers,
    )


def _evaluate(
    model: torch.nn.Module,
    data: torch.utils.data.Dataset,
    dist_context: DistributedContext,
    options: argparse.Namespace,
) -> dict[str, Any]:
    found = _score(model, data, dist_context, options)
    if dist_context.is_primary:
        print(f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}")
    return found


def _print_row(row: dict[str, Any]) -> None:
    line = f"epoch {row['epoch']:3}   lr {row['lr']:.4f}   train {row['train_loss']:.3f}"
    line += f"   test {row['loss']:.3f}   top-1 {row['top1']:6.2f} %"
    if "ema_top1" in row:
        line += f"   averaged {row['ema_top1']:6.2f} %"
    print(f"{line}   {row['seconds']:.0f} s", flush=True)


def main() -> None:
    """Train or evaluate; say in one line what cannot be done."""
    with exit_on_user_error("train.py"):
        run(parse())


if __name__ == "__main__":
    main()
