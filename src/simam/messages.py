"""Build messages for users: errors, install hints, shapes, lists and tables."""

import textwrap
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """An error that the user can correct; the message says how."""


def one_line(error: Exception, width: int = 160) -> str:
    """Summarise an error of another library in one line: its type, and the start of its message."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), width)}".removesuffix(": ")


def install_hint(extra: str) -> str:
    """Say how to install an extra, from a package index or from a checkout."""
    return (
        f'install the extra "{extra}": pip install "simam[{extra}]", '
        f'or from a checkout pip install ".[{extra}]"'
    )


def format_shape(shape: Iterable[int]) -> str:
    """Write a shape as 1x3x224x224, and the empty shape as scalar."""
    return "x".join(map(str, shape)) or "scalar"


def first_few(names: Sequence[str], count: int = 3) -> str:
    """List the first names, and the number of the others."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f", and {more} more" if more > 0 else "")


def table(rows: Sequence[Sequence[str]], alignments: str = "", gap: str = "  ") -> str:
    """Format rows of cells as a table with aligned columns.

    Args:
        rows (sequence of sequence of str): the cells; all rows have the same length.
        alignments (str): "<" or ">" for each column; by default every column is aligned to the
            left.
        gap (str): the text between two columns.

    Returns:
        str: one line per row, without spaces at the end of a line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = alignments or "<" * len(widths)
    form = gap.join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)
