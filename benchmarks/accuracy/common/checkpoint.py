"""Files that are whole or not there: checkpoints, and what is written beside them.

timm's CheckpointSaver removes the last checkpoint before the new one takes its place, so that a
run killed in between is left without. It also stores the arguments as an object, for which reading
the file safely takes an exception.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from simam.messages import UserError, one_line


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file such that at any moment, even of a crash, the old or the new one is there.

    Args:
        path (Path): the file.
        write (callable): writes the content into the file that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # the new name, too, is to survive a loss of power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a file of JSON."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: tensors and plain values, in dicts, lists and tuples."""
    write_whole(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, onto the CPU, without running code from it.

    Raises:
        UserError: the file is missing, damaged, or no checkpoint of a run.
    """
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint may break anywhere in the reader
        raise UserError(f"{path} is damaged or no checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is no checkpoint of a run; expected one that a run wrote")
    return content
