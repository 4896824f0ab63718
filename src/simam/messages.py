"""How messages to users are worded: errors, shapes, lists and tables."""

import textwrap
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """The request cannot be carried out; the message says what to do instead."""


def one_line(error: Exception, width: int = 160) -> str:
    """Summarise an error of someone else's code in one short line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), width)}".removesuffix(": ")


def install_hint(extra: str) -> str:
    """Say how to install what an extra brings, from an index or from a checkout."""
    return (
        f'install the extra "{extra}": pip install "simam[{extra}]", '
        f'or from a checkout pip install ".[{extra}]"'
    )


def format_shape(shape: Iterable[int]) -> str:
    """Write a shape as people do: 1x3x224x224."""
    return "x".join(map(str, shape)) or "scalar"


def first_few(names: Sequence[str], count: int = 3) -> str:
    """List the first names, and how many more there are."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f", and {more} more" if more > 0 else "")


def table(rows: Sequence[Sequence[str]], alignments: str = "", gap: str = "  ") -> str:
    """Align rows of cells in columns.

    Args:
        rows (sequence of sequence of str): the cells; every row has as many.
        alignments (str): "<" or ">" for each column; by default all are aligned to the left.
        gap (str): what separates columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = alignments or "<" * len(widths)
    form = gap.join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)
