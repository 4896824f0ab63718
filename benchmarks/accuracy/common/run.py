"""A run in its folder: how it was made, how far it is, and going on from there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import simam
from simam.messages import UserError

from .checkpoint import load, save, write_json
from .log import RunLog
from .trainer import BaseTrainer

_LAST = "last.pth"


def checkpoint(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """What a run left in the folder to go on from; None if there was none.

    Raises:
        UserError: there is a run and it is not asked to go on, or its file is damaged.
    """
    last = folder / _LAST
    if not last.exists():
        return None
    if not resume:
        raise UserError(f"{last} exists; go on from it with --resume, or choose another --output")
    content = load(last)
    missing = {"optimizer", "settings", "rows"} - content.keys()
    if missing:
        raise UserError(f"{last} is no checkpoint of a run: it has no {', '.join(sorted(missing))}")
    return content


class Run:
    """A run in its folder, of which every whole epoch is kept.

    Args:
        folder (Path): where its files are.
        trainer (BaseTrainer): what is trained; it is put where the checkpoint was written.
        settings (dict): what the result depends on, and must not change on the way.
        saved (dict, optional): a `checkpoint` to go on from.
        best (str): the column of a row by which the best epoch is chosen; more is better.
        curves (dict of str to tuple of str): columns to draw together, by the title of the plot.
        tensorboard (bool): whether to write TensorBoard's events, too.

    Attributes:
        rows (list of dict): what was found, epoch by epoch.

    Raises:
        UserError: the checkpoint is of a run with other settings.
    """

    def __init__(
        self,
        folder: Path,
        trainer: BaseTrainer,
        settings: dict[str, Any],
        saved: dict[str, Any] | None,
        *,
        best: str,
        curves: Mapping[str, tuple[str, ...]],
        tensorboard: bool,
    ) -> None:
        self.folder, self.trainer, self.settings, self.best = folder, trainer, settings, best
        self.rows = self._go_on(saved) if saved else []
        dist_context = trainer.dist_context
        dist_context.barrier()  # until all have looked for a checkpoint
        self._journal = None
        if dist_context.is_primary:
            about = settings | {"processes": dist_context.size, "device": str(dist_context.device)}
            about |= {"torch": torch.__version__, "simam": simam.__version__}
            write_json(about, folder / "settings.json")
            self._journal = RunLog(folder, curves, self.rows, tensorboard=tensorboard)

    def _go_on(self, saved: dict[str, Any]) -> list[dict[str, Any]]:
        were, are = saved["settings"], self.settings
        changes = [f"{n} was {were.get(n)}, now {are[n]}" for n in are if are[n] != were.get(n)]
        if changes:
            raise UserError(
                f"{self.folder / _LAST} is of a run with other settings: {'; '.join(changes)}"
            )
        self.trainer.load(saved)
        return saved["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Keep an epoch: its row in the log, and its checkpoint."""
        better = row[self.best] > max((r[self.best] for r in self.rows), default=-1)
        self.rows.append(row)
        if self._journal:
            content = self.trainer.state() | {"settings": self.settings, "rows": self.rows}
            content |= {"arch": self.settings["model"], "epoch": len(self.rows)}
            if better:
                save(content, self.folder / "best.pth")
            save(content, self.folder / _LAST)
            self._journal.add(row)

    def close(self) -> None:
        """Draw its curves."""
        if self._journal:
            self._journal.close()
