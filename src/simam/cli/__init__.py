"""The command `simam`, also `python -m simam`."""

import argparse
import json
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..attach import attach
from ..messages import UserError, format_shape
from ..module import SimAM
from . import figure
from . import maps as gate_maps
from .models import build, options_named
from .report import Progress, Report, measure

_WIDTH = 96
_MODEL = (
    "NAME, torchvision/NAME or timm/NAME; a bare NAME is torchvision's if it has one, else timm's"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. A mistake of the user's is one message on stderr.

    Args:
        argv (sequence of str, optional): the arguments; by default those of the process.

    Returns:
        int: the exit status: 0, 2 for a mistake, 130 if interrupted.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if "run" not in options:
            parser.print_help()
            return 0
        with warnings.catch_warnings():
            # They are about the libraries' own code, or the report says the same.
            warnings.simplefilter("ignore")
            options.run(options)
    except UserError as error:
        print(f"simam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _report(options: argparse.Namespace) -> None:
    with _progress() as progress:
        progress(f"building {options.model}", 0, 1)
        subject = build(options.model, options.weights)
        report = measure(
            subject,
            subject.shape(options.batch, options.input_size),
            e_lambda=options.e_lambda,
            statistics=options.statistics,
            where=options.where,
            exclude=options.exclude,
            repeats=options.repeats,
            progress=progress,
        )
    print(json.dumps(asdict(report)) if options.json else _text(report))


def _maps(options: argparse.Namespace) -> None:
    figure.check_output(options.output, options.images)
    images = [gate_maps.read(path) for path in options.images]
    with _progress() as progress:
        progress(f"building {options.model}", 0, 1)
        subject = build(options.model, options.weights)
        with options_named():
            attach(
                subject.model,
                e_lambda=options.e_lambda,
                statistics=options.statistics,
                where=options.where,
                exclude=options.exclude,
            )
        seen, layers = gate_maps.look(
            subject,
            images,
            options.layers,
            statistics=options.statistics,
            progress=progress,
        )
        progress("drawing", 0, 1)
        weights = f"weights: {Path(options.weights).name if options.weights else 'random'}"
        other = f", statistics={options.statistics!r}" * (options.statistics != "shared")
        title = f"{subject.name}, {weights}, SimAM(e_lambda={options.e_lambda:g}{other})"
        names = [Path(path).name for path in options.images]
        figure.save(figure.draw(names, seen, layers, title), options.output)
    print(f"{options.output}: {', '.join(layer.path for layer in layers)} of {title}")


def _text(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    form = {"batch": "", "list": " as a list of images", "pair": " and another of that shape"}
    lines = [
        f"{report.model} of {report.library}, weights: {report.weights or 'random'}",
        f"SimAM(e_lambda={report.e_lambda:g}, statistics={report.statistics!r}); "
        f"input {format_shape(report.input_shape)}{form[report.takes]}",
        f"{versions}; {report.threads} thread{'s' if report.threads > 1 else ''}",
        "",
    ]
    rows = [("SimAM after", "convolution", "output")]
    for place in report.insertions:
        shape = format_shape(place.shape) if place.shape else "not used in this forward pass"
        calls = f", {place.calls} calls" if place.calls > 1 else ""
        rows.append((place.path, place.conv, shape + calls))
    lines += _columns(rows, "<<<")
    if report.unanalysed:
        lines += ["", "Not analysed, so without SimAM:"]
        for block in report.unanalysed:
            text = f"  {block['block'] or '(model)'}: {block['reason']}"
            lines += textwrap.wrap(text, width=_WIDTH, subsequent_indent="    ")

    times, ratio = report.forward_ms, report.ratio
    middle = [times["before_quartiles"], times["after_quartiles"]]
    costs: list[tuple[str, ...]] = [
        ("", "before", "after", "ratio"),
        ("parameters", *_change(report.parameters, "M", 1e6)),
        ("multiply-adds", *_change(report.multiply_adds, "G", 1e9)),
        ("time", f"{times['before']:.1f} ms", f"{times['after']:.1f} ms", f"{ratio:.2f}"),
    ]
    if report.repeats > 1:
        costs += [("  middle half", *map(_range, middle), _range(report.ratio_quartiles, ".2f"))]
    lines += ["", *_columns(costs, "<>>>"), ""]
    pairs = "1 pair" if report.repeats == 1 else f"{report.repeats} pairs"
    notes = [
        f"Time: medians over {pairs} of forward passes, before and after in turns; the ratio is "
        "the median of the pairs' ratios.",
        "Multiply-adds: convolutions, matrix products, and 2 for every element that a batch norm "
        "normalises, as the paper counts. Other elementwise work is left out, SimAM's too: it "
        f"scales {_count(report.elements)} values in a pass.",
    ]
    if len(set(report.multiply_adds.values())) > 1:
        notes += ["They differ where a model's work depends on values, as on the regions it found."]
    return "\n".join([*lines, *textwrap.wrap(" ".join(notes), width=_WIDTH)])


def _columns(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "   ".join(f"{{:{a}{w}}}" for a, w in zip(alignments, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def _change(numbers: dict[str, int], unit: str, size: float) -> tuple[str, str, str]:
    before, after = numbers["before"], numbers["after"]
    return f"{before / size:.2f} {unit}", f"{after / size:.2f} {unit}", f"{after / before:.2f}"


def _range(ends: Iterable[float], form: str = ".1f") -> str:
    return " to ".join(format(end, form) for end in ends)


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else str(number)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Shows how far the report is, on stderr if that is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with the extra of the models, and nothing depends on it
        yield lambda stage, done, total: None
        return
    with tqdm(total=1, disable=None, leave=False, bar_format="{desc} {bar} {n}/{total}") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.n, bar.total = done, total
            bar.refresh()

        yield show


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog="simam", description="SimAM: attention without parameters.")
    parser.add_argument("--version", action="version", version=f"simam {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    insertion = _Parser(add_help=False)
    add = insertion.add_argument
    add("--weights", metavar="FILE", help="state dict to load: .pt, .pth or .safetensors")
    add(
        "--e-lambda",
        type=_e_lambda,
        default=1e-4,
        metavar="X",
        help="the regulariser of SimAM; 0.1 for ImageNet (default: 0.0001)",
    )
    add(
        "--statistics",
        choices=("shared", "leave_one_out"),
        default="shared",
        help="statistics of a channel: the authors' or the exact ones (default: shared)",
    )
    add(
        "--where",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="put SimAM after the convolutions whose paths match",
    )
    add("--exclude", nargs="+", action="extend", metavar="GLOB", help="leave these places out")

    report = commands.add_parser(
        "report",
        parents=[insertion],
        help="show what SimAM does to a model",
        description="Show where SimAM goes in a model of torchvision or timm, and compare "
        "parameters, multiply-adds and forward time before and after. Nothing is downloaded.",
    )
    report.set_defaults(run=_report)
    add = report.add_argument
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
        help="height and width as one number, or the whole C H W (C T H W for video)",
    )
    add("--batch", type=_positive, default=1, metavar="N", help="samples at once (default: 1)")
    add(
        "--repeats",
        type=_positive,
        metavar="N",
        help="pairs of forward passes to time (default: 8 seconds of them)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object; simam.report.Report documents its keys",
    )

    maps = commands.add_parser(
        "maps",
        parents=[insertion],
        help="draw what a model with SimAM attends to in photographs",
        description="Put SimAM into a model of torchvision or timm, and draw photographs, the "
        "gates of its layers laid over them, and histograms of the gates. Nothing is downloaded.",
    )
    maps.set_defaults(run=_maps)
    add = maps.add_argument
    add("model", metavar="MODEL", help=_MODEL)
    add("images", nargs="+", metavar="IMAGE", help="photographs, right after MODEL")
    add(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the picture to write: .png, .pdf, .svg or another format of matplotlib",
    )
    add(
        "--layers",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="draw the layers whose paths match (default: the last of each resolution)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.lstrip("+-").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
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
