"""Write files atomically: checkpoints, and the other files of a run.

timm's CheckpointSaver removes the last checkpoint before it renames the new one, so a run killed in
between loses both. It also pickles the arguments as an object, which a safe reader has to allow.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from simam.messages import UserError, one_line


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, even after a crash, the path holds the old or the new content.

    Args:
        path (Path): the file.
        write (callable): writes the content to the open file that it is called with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the renaming also has to survive a loss of power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: tensors and plain values, in dicts, lists and tuples."""
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code from it.

    Raises:
        UserError: the file is missing, damaged, or not the checkpoint of a run.
    """
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail anywhere in the reader
        raise UserError(f"{path} is damaged or not a checkpoint: {one_line(error)}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is not the checkpoint of a run: it has no state_dict")
    return content
