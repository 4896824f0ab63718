"""The text of a report, for people to read."""

import textwrap
from collections.abc import Iterable

from ..messages import format_shape, table
from .report import MeasuredInsertion, Report

_WIDTH = 96


def report_text(report: Report) -> str:
    """Write a report as text: insertions, costs, and how the costs were measured."""
    sections = [_header(report), _insertions(report.insertions)]
    if report.unanalysed:
        sections.append(_unanalysed(report.unanalysed))
    return "\n\n".join([*sections, _costs(report), _notes(report)])


def _header(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    takes = {"batch": "", "list": " as a list of images", "pair": ", a pair of this shape"}
    place = f", place={report.place!r}" * (report.place != "conv")
    return "\n".join(
        [
            f"{report.model} of {report.library}, weights: {report.weights or 'random'}",
            f"SimAM(e_lambda={report.e_lambda:g}, statistics={report.statistics!r}){place}; "
            f"input {format_shape(report.input_shape)}{takes[report.takes]}",
            f"{versions}; {report.threads} thread{'s' if report.threads > 1 else ''}",
        ]
    )


def _insertions(insertions: Iterable[MeasuredInsertion]) -> str:
    rows = [("SimAM after", "host", "output")]
    for insertion in insertions:
        shape = format_shape(insertion.shape) if insertion.shape else "not called"
        calls = f", {insertion.calls} calls" if insertion.calls > 1 else ""
        rows.append((insertion.path, insertion.host, shape + calls))
    return table(rows, "<<<", gap="   ")


def _unanalysed(blocks: Iterable[dict[str, str]]) -> str:
    lines = ["Not analysed, so without SimAM:"]
    for block in blocks:
        text = f"  {block['block'] or '(model)'}: {block['reason']}"
        lines += textwrap.wrap(text, width=_WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def _costs(report: Report) -> str:
    times, ratio = report.forward_ms, report.ratio
    rows: list[tuple[str, ...]] = [
        ("", "before", "after", "ratio"),
        ("parameters", *_change(report.parameters, "M", 1e6)),
        ("multiply-adds", *_change(report.multiply_adds, "G", 1e9)),
        ("time", f"{times['before']:.1f} ms", f"{times['after']:.1f} ms", f"{ratio:.2f}"),
    ]
    if report.repeats > 1:
        quartiles = [times["before_quartiles"], times["after_quartiles"]]
        ranges = [*map(_range, quartiles), _range(report.ratio_quartiles, ".2f")]
        rows.append(("  quartiles", *ranges))
    return table(rows, "<>>>", gap="   ")


def _notes(report: Report) -> str:
    pairs = "1 pair" if report.repeats == 1 else f"{report.repeats} pairs"
    notes = [
        f"Time: medians over {pairs} of forward passes, one before and one after, interleaved; "
        "the ratio is the median of the ratios of the pairs.",
        "Multiply-adds: convolutions, matrix products, and 2 for every element that a batch norm "
        "normalises, as in the paper. Other elementwise operations are not counted, including "
        f"those of SimAM, which scales {_count(report.elements)} values in a forward pass.",
    ]
    if len(set(report.multiply_adds.values())) > 1:
        notes.append(
            "The counts differ if the work of the model depends on activations, such as on the "
            "number of detected regions."
        )
    return "\n".join(textwrap.wrap(" ".join(notes), width=_WIDTH))


def _change(numbers: dict[str, int], unit: str, size: float) -> tuple[str, str, str]:
    before, after = numbers["before"], numbers["after"]
    return f"{before / size:.2f} {unit}", f"{after / size:.2f} {unit}", f"{after / before:.2f}"


def _range(ends: Iterable[float], form: str = ".1f") -> str:
    return " to ".join(format(end, form) for end in ends)


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else str(number)
