"""A run and its folder: settings, log and checkpoints, and how a run is resumed."""

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


def read_checkpoint(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """Read the last checkpoint of a run, if its folder has one.

    Args:
        folder (Path): the folder of the run.
        resume (bool): whether the run may be resumed.

    Raises:
        UserError: there is a checkpoint but `resume` is false, or the file is damaged.
    """
    last = folder / _LAST
    if not last.exists():
        return None
    if not resume:
        raise UserError(f"{last} exists; resume from it with --resume, or choose another --output")
    content = load(last)
    missing = {"optimizer", "settings", "rows"} - content.keys()
    if missing:
        raise UserError(
            f"{last} is not the checkpoint of a run: it has no {', '.join(sorted(missing))}"
        )
    return content


class Run:
    """A run that saves a log row and a checkpoint after every epoch.

    Args:
        folder (Path): where the files of the run are.
        trainer (BaseTrainer): what is trained; its state is restored if there is a checkpoint.
        settings (dict): everything that the result depends on; a resumed run must have the same.
        saved (dict, optional): a checkpoint from `read_checkpoint` to resume from.
        best (str): the column that chooses the best epoch; larger is better.
        curves (dict of str to tuple of str): columns to plot together, by the title of the plot.
        tensorboard (bool): whether to write TensorBoard's event files too.

    Attributes:
        rows (list of dict): the log, one row per epoch.

    Raises:
        UserError: the checkpoint was written with other settings.
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
        self.rows = self._resume(saved) if saved else []
        dist_context = trainer.dist_context
        dist_context.barrier()  # until every process has looked for a checkpoint
        self._log = None
        if dist_context.is_primary:
            about = settings | {
                "processes": dist_context.world_size,
                "device": str(dist_context.device),
                "torch": torch.__version__,
                "simam": simam.__version__,
            }
            write_json(about, folder / "settings.json")
            self._log = RunLog(folder, curves, self.rows, tensorboard=tensorboard)

    def _resume(self, saved: dict[str, Any]) -> list[dict[str, Any]]:
        old, new = saved["settings"], self.settings
        changes = [f"{n} was {old.get(n)}, now {new[n]}" for n in new if new[n] != old.get(n)]
        if changes:
            raise UserError(
                f"{self.folder / _LAST} was written with other settings: {'; '.join(changes)}"
            )
        self.trainer.load_state_dict(saved)
        rows: list[dict[str, Any]] = saved["rows"]
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """End an epoch: append its row to the log and save a checkpoint."""
        is_best = row[self.best] > max((r[self.best] for r in self.rows), default=-1)
        self.rows.append(row)
        if self._log:
            content = self.trainer.state_dict() | {"settings": self.settings, "rows": self.rows}
            content |= {"arch": self.settings["model"], "epoch": len(self.rows)}
            if is_best:
                save(content, self.folder / "best.pth")
            save(content, self.folder / _LAST)
            self._log.add(row)

    def close(self) -> None:
        """Plot the curves."""
        if self._log:
            self._log.close()
