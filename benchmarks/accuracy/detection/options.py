"""The command line of detect.py."""

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.accuracy.common.options import add_run_options, positive_int

from .recipes import RECIPES, Recipe


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; `numbers` has those of the recipe that are given, by name."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Options without a default take the recipe's number: see docs/detection.md.",
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--data", type=Path, help="folder of COCO's layout; default: drawn shapes")
    what.add_argument(
        "--splits",
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="its parts, as in annotations/instances_TRAIN.json; default: train2017 val2017",
    )
    what.add_argument("--backbone-weights", type=Path, help="classifier to start from")
    what.add_argument("--weights", type=Path, help="checkpoint of a run, for --evaluate")
    how = parser.add_argument_group("how")
    how.add_argument("--recipe", choices=RECIPES, help="default: shapes; with --data, paper-coco")
    for number in fields(Recipe):
        _add_number(how, number)
    how.add_argument("--accumulate", type=positive_int, default=1, help="turns that a step takes")
    how.add_argument("--seed", type=int, default=0, help="default: 0")
    add_run_options(parser)
    options = parser.parse_args(arguments)
    if options.evaluate != bool(options.weights):
        parser.error(
            "expected --evaluate and --weights FILE together, got one of them; to train from the "
            "weights of a classifier, give --backbone-weights FILE"
        )
    if options.evaluate and (options.resume or options.backbone_weights):
        parser.error("--evaluate: expected neither --resume nor --backbone-weights")
    if options.splits and not options.data:
        parser.error("--splits: expected --data DIR with it, got none")
    _complete(options)
    return options


def _add_number(group: Any, number: Field) -> None:
    """An option for a number of the recipes."""
    form: dict[str, Any] = {"type": number.type}
    if number.type is bool:
        form = {"action": argparse.BooleanOptionalAction}
    elif get_args(number.type):
        form = {"type": get_args(number.type)[0], "nargs": "+"}
    option = f"--{number.name.replace('_', '-')}"
    group.add_argument(option, **form, help=number.metadata["help"])


def _complete(options: argparse.Namespace) -> None:
    """What follows from other options."""
    given = {number.name: getattr(options, number.name) for number in fields(Recipe)}
    options.numbers = {
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
        recipe = RECIPES[options.recipe].changed(options.numbers)
        data = options.data.name if options.data else "shapes"
        name = f"{data}-{recipe.model}-{recipe.attention}-seed{options.seed}"
        options.output = Path("runs") / name
    options.shapes = options.data is None
    if options.shapes:
        options.data, options.splits = options.output / "shapes", ("train", "val")
    options.splits = options.splits or ("train2017", "val2017")
