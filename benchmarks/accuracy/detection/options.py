"""The command line of `benchmarks.accuracy.detect`."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.accuracy.common.options import add_run_options, positive_int

from .recipes import RECIPES, Recipe

PROG = "python -m benchmarks.accuracy.detect"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments (sequence of str, optional): by default those of the process.

    Returns:
        argparse.Namespace: the options with their defaults; `overrides` maps the recipe fields
            set on the command line to their values.

    Raises:
        UserError: a value of the recipe is out of range.
    """
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train or evaluate Faster R-CNN or Mask R-CNN with SimAM in the backbone, or "
        "without. Without options: a small Mask R-CNN on drawn shapes.",
        epilog="Options without a default take their value from the recipe: see docs/detection.md.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data and weights")
    data.add_argument(
        "--data", type=Path, help="folder of a data set in COCO's layout; default: drawn shapes"
    )
    data.add_argument(
        "--splits",
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="splits of --data, as in annotations/instances_TRAIN.json; default: train2017 val2017",
    )
    data.add_argument(
        "--backbone-weights", type=Path, help="weights of a classifier to start the backbone from"
    )
    data.add_argument("--weights", type=Path, help="checkpoint of a run, for --evaluate")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--recipe", choices=RECIPES, help="default: shapes; with --data, paper-coco"
    )
    for recipe_field in fields(Recipe):
        _add_recipe_option(training, recipe_field)
    training.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        help="gradient-accumulation steps per optimizer step; default: 1",
    )
    training.add_argument("--seed", type=int, default=0, help="default: 0")
    add_run_options(parser)
    options = parser.parse_args(arguments)
    if options.evaluate != bool(options.weights):
        parser.error(
            "expected --evaluate and --weights FILE together, got one of them; to train from the "
            "weights of a classifier, use --backbone-weights FILE"
        )
    if options.evaluate and (options.resume or options.backbone_weights):
        parser.error("--evaluate: expected neither --resume nor --backbone-weights")
    if options.splits and not options.data:
        parser.error("--splits: expected --data DIR with it, got none")
    _complete(options)
    return options


def _add_recipe_option(group: Any, recipe_field: Field[Any]) -> None:
    """Add the option that overrides a field of the recipe."""
    kind: Any = recipe_field.type
    arguments: dict[str, Any] = {"type": kind}
    if kind is bool:
        arguments = {"action": argparse.BooleanOptionalAction}
    elif get_args(kind):
        arguments = {"type": get_args(kind)[0], "nargs": "+"}
    option = f"--{recipe_field.name.replace('_', '-')}"
    group.add_argument(option, **arguments, help=recipe_field.metadata["help"])


def _complete(options: argparse.Namespace) -> None:
    """Collect the overrides, and fill in defaults that depend on other options."""
    given = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    options.overrides = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    if options.recipe is None:
        options.recipe = "paper-coco" if options.data else "shapes"
    if options.workers is None:
        options.workers = 4 * torch.cuda.is_available()
    if options.output is None and options.evaluate:
        options.output = options.weights.parent
    elif options.output is None:
        recipe = RECIPES[options.recipe].override(options.overrides)
        data = options.data.name if options.data else "shapes"
        name = f"{data}-{recipe.model}-{recipe.attention}-seed{options.seed}"
        options.output = Path("runs") / name
    options.shapes = options.data is None
    if options.shapes:
        options.data, options.splits = options.output / "shapes", ("train", "val")
    options.splits = options.splits or ("train2017", "val2017")
