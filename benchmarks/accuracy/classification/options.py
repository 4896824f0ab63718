"""The command line of `benchmarks.accuracy.train`."""

import argparse
from pathlib import Path

import torch

from benchmarks.accuracy.common.options import add_run_options, positive_int

from .recipes import RECIPES

PROG = "python -m benchmarks.accuracy.train"
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
ATTENTION = ("none", "simam", "simam-post-norm", "simam-branch", "se", "eca", "cbam", "gc")

# Options that default to the recipe's field of the same name.
RECIPE_FIELDS = ("model", "e_lambda", "batch_size", "lr", "weight_decay", "momentum", "input_size")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; those not given take the values of the recipe."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train or evaluate an image classifier with SimAM, another attention layer, or "
        "none. Without options: a small network on scikit-learn's digits.",
        epilog="Options without a default take the recipe's value: see docs/training.md.",
        allow_abbrev=False,
    )
    subject = parser.add_argument_group("data and network")
    subject.add_argument("--dataset", choices=DATASETS, default="digits", help="default: digits")
    subject.add_argument("--data", type=Path, help="folder of the dataset")
    subject.add_argument("--model", help="cifar_NAME, or the name of a torchvision or timm model")
    subject.add_argument("--attention", choices=ATTENTION, default="simam", help="default: simam")
    subject.add_argument("--e-lambda", type=float, help="lambda of SimAM")
    subject.add_argument("--weights", type=Path, help="weights to start from, or to evaluate")
    training = parser.add_argument_group("training")
    training.add_argument("--recipe", choices=RECIPES, default="small", help="default: small")
    training.add_argument(
        "--epochs", type=positive_int, help="length; the recipe's milestones are scaled to it"
    )
    training.add_argument(
        "--batch-size", type=positive_int, help="images per optimizer step, over all devices"
    )
    training.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        help="gradient-accumulation steps per optimizer step; default: 1",
    )
    training.add_argument("--lr", type=float, help="initial learning rate")
    training.add_argument("--momentum", type=float, help="of SGD")
    training.add_argument("--weight-decay", type=float, help="applied to all parameters")
    training.add_argument("--input-size", type=positive_int, help="side of the network's input")
    training.add_argument(
        "--ema", type=float, metavar="DECAY", help="also keep an average of the weights"
    )
    training.add_argument("--seed", type=int, default=0, help="default: 0")
    run = add_run_options(parser)
    run.add_argument("--channels-last", action="store_true", help="memory layout of the images")
    run.add_argument("--compile", action="store_true", help="use torch.compile")
    run.add_argument("--deterministic", action="store_true", help="reproducible on GPUs; slower")
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
