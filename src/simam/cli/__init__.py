"""The command `simam`, also `python -m simam`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..messages import UserError
from ..module import SimAM
from ..placement import PLACES
from .commands import run_maps, run_report
from .identify import run_identify

_MODEL = (
    "NAME, torchvision/NAME or timm/NAME; a bare NAME is looked up in torchvision first, then in "
    "timm"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. A user error is printed as one message on stderr.

    Args:
        argv (sequence of str, optional): the arguments; by default those of the process.

    Returns:
        int: the exit status: 0, 2 for a user error, 130 for an interruption.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if "run" not in options:
            parser.print_help()
            return 0
        with warnings.catch_warnings():
            # Libraries warn about their own code; what attach warns about is in the report.
            warnings.simplefilter("ignore")
            options.run(options)
    except UserError as error:
        print(f"simam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="simam",
        description="SimAM, parameter-free attention for convolutional networks.",
    )
    parser.add_argument("--version", action="version", version=f"simam {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_report(commands)
    _add_maps(commands)
    _add_identify(commands)
    return parser


def _simam_options() -> _Parser:
    """The options of both commands: what is inserted, and where."""
    parser = _Parser(add_help=False)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="state dict to load: .pt, .pth or .safetensors")
    add(
        "--e-lambda",
        type=_e_lambda,
        default=1e-4,
        metavar="X",
        help="the regulariser lambda of SimAM; the authors use 0.1 on ImageNet (default: 0.0001)",
    )
    add(
        "--statistics",
        choices=("shared", "leave_one_out"),
        default="shared",
        help="channel statistics: shared, as in the authors' code, or the exact leave_one_out "
        "(default: shared)",
    )
    add(
        "--place",
        choices=PLACES,
        default="conv",
        help="where in the residual branch: conv, after its last spatial convolution, as the "
        "authors; norm, after the norm behind it; branch, just before the add (default: conv)",
    )
    add(
        "--where",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="insert SimAM after the modules whose paths match, instead of those that the analysis "
        "of the model selects; a glob that matches convolutions selects these alone",
    )
    add(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="leave out the insertions whose paths match",
    )
    return parser


def _add_report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "report",
        parents=[_simam_options()],
        help="compare a model without and with SimAM",
        description="Show where SimAM goes in a torchvision or timm model, and compare "
        "parameters, multiply-adds and forward time before and after. Nothing is downloaded.",
    )
    parser.set_defaults(run=run_report)
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default="resnet18",
        metavar="MODEL",
        help=f"{_MODEL} (default: resnet18)",
    )
    add(
        "--input-size",
        nargs="+",
        type=_positive,
        metavar="N",
        help="one number for height and width, or all of C H W (C T H W for video)",
    )
    add("--batch", type=_positive, default=1, metavar="N", help="batch size (default: 1)")
    add(
        "--repeats",
        type=_positive,
        metavar="N",
        help="pairs of forward passes to time (default: as many as take 8 seconds)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object; simam.cli.report.Report documents its keys",
    )


def _add_maps(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "maps",
        parents=[_simam_options()],
        help="draw what a model with SimAM attends to in images",
        description="Insert SimAM into a torchvision or timm model, and draw images, the gates of "
        "the SimAM layers laid over the images, and histograms of the gates. Nothing is "
        "downloaded.",
    )
    parser.set_defaults(run=run_maps)
    add = parser.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    add("images", nargs="+", metavar="IMAGE", help="image files, directly after MODEL")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the figure to write: .png, .pdf, .svg or another format of matplotlib",
    )
    add(
        "--layers",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="draw the SimAM layers whose paths match (default: the last layer of each resolution)",
    )


def _add_identify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "identify",
        help="say which formula a hand-written SimAM computes",
        description="Build a module from a Python file, and say which formula of SimAM it "
        "computes, with which lambda, and what differs from the paper. This imports the file and "
        "runs its code.",
    )
    parser.set_defaults(run=run_identify)
    parser.add_argument(
        "module",
        metavar="FILE.py:CLASS",
        help="a class of nn.Module in a file; arguments of its constructor are literals in "
        "parentheses: 'FILE.py:CLASS(64, e_lambda=0.1)'",
    )


def _positive(text: str) -> int:
    number = int(text) if text.lstrip("+-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _e_lambda(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    try:
        return SimAM(e_lambda=number).e_lambda
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
