"""What a run found, epoch by epoch: a table, curves, and TensorBoard when asked."""

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simam.messages import UserError

from .checkpoint import write_whole

_EXTRA = 'pip install "simam[train]"'


class RunLog:
    """The rows of a run, written to `log.csv` as they come and to `curves.png` at the end.

    Args:
        folder (Path): where to write.
        curves (dict of str to tuple of str): columns to draw together, by the title of the plot.
        rows (list of dict): those of the run so far, if it goes on.
        tensorboard (bool): whether to write TensorBoard's events, too.

    Raises:
        UserError: TensorBoard is asked for and missing.
    """

    def __init__(
        self,
        folder: Path,
        curves: Mapping[str, tuple[str, ...]],
        rows: list[dict[str, Any]],
        *,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.curves, self.rows = folder, curves, list(rows)
        self._events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(f"--tensorboard needs tensorboard ({error}): {_EXTRA}") from error
            # Events after the epoch at which a run goes on are those of the run that broke off.
            self._events = SummaryWriter(folder, purge_step=len(self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """One epoch: the row must have the columns of those before it."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
        for name, value in row.items() if self._events else ():
            self._events.add_scalar(name, value, len(self.rows) - 1)

    def close(self) -> None:
        """Draw the curves."""
        if self._events:
            self._events.close()
        if self.rows:
            draw(self.rows, self.curves, self.folder / "curves.png")


def draw(rows: list[dict[str, Any]], curves: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Draw columns of rows over the epochs, one plot for every title."""
    with picture(path, 5 * len(curves), 3.6) as figure:
        plots = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (title, columns) in zip(plots, curves.items(), strict=True):
            for column in columns:
                axes.plot(
                    range(1, len(rows) + 1), [row[column] for row in rows], ".-", label=column
                )
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of matplotlib to draw into, which becomes a PNG file in the end.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"curves need matplotlib ({error}): {_EXTRA}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, lambda file: file.write(buffer.getvalue()))
