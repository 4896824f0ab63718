"""The log of a run, epoch by epoch: a table, curves and, if requested, TensorBoard events."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simam.messages import UserError, install_hint

from .checkpoint import write_atomically


class RunLog:
    """Writes the rows of a run: `log.csv` after every epoch, `curves.png` at the end.

    Args:
        folder (Path): where to write.
        curves (dict of str to tuple of str): columns to plot together, by the title of the plot.
        rows (list of dict): the rows of a resumed run so far.
        tensorboard (bool): whether to write TensorBoard's event files too.

    Raises:
        UserError: TensorBoard is requested but not installed.
    """

    def __init__(
        self,
        folder: Path,
        curves: Mapping[str, tuple[str, ...]],
        rows: Sequence[dict[str, Any]],
        *,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.curves, self.rows = folder, curves, list(rows)
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                hint = install_hint("train")
                raise UserError(f"--tensorboard needs tensorboard ({error}); {hint}") from error
            # Drops the events after the epoch that a resumed run continues from.
            self._events = SummaryWriter(folder, purge_step=len(self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Write the row of an epoch; it must have the same columns as the earlier rows."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
        for name, value in row.items() if self._events else ():
            self._events.add_scalar(name, value, len(self.rows) - 1)

    def close(self) -> None:
        """Plot the curves."""
        if self._events:
            self._events.close()
        if self.rows:
            plot(self.rows, self.curves, self.folder / "curves.png")


def plot(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, tuple[str, ...]], path: Path
) -> None:
    """Plot columns of the log over the epochs, one plot for every title in `curves`."""
    with png_figure(path, 5 * len(curves), 3.6) as figure:
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
def png_figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure, saved as a PNG file when the context ends.

    Args:
        path (Path): the PNG file.
        width (float): in inches.
        height (float): in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({error}); {install_hint('train')}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
