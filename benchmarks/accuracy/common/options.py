"""What the command lines of the training scripts share."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simam.messages import UserError, install_hint


def add_run_options(parser: argparse.ArgumentParser) -> Any:
    """Add the options of a run that do not define what is trained: files, device, precision."""
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, help="folder to write to; default: one under runs/")
    run.add_argument(
        "--resume", action="store_true", help="resume from the checkpoint in --output, if any"
    )
    run.add_argument("--evaluate", action="store_true", help="only evaluate the file of --weights")
    run.add_argument("--device", help="cpu or cuda; default: cuda if a GPU is available")
    run.add_argument("--workers", type=int, help="worker processes that load images, per device")
    run.add_argument(
        "--amp",
        choices=("none", "bfloat16", "float16"),
        default="none",
        help="dtype of automatic mixed precision; default: none",
    )
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard event files too")
    return run


def positive_int(text: str) -> int:
    """Parse an option that must be an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turn a failed import inside this context into an error that names the extra to install.

    Raises:
        UserError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}; {install_hint(extra)}") from error


@contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Exit with one line on stderr if the request cannot be carried out or is interrupted.

    Args:
        script (str): what the line calls the script.
    """
    try:
        yield
    except UserError as error:
        # The message of an error in a worker process starts with the worker's traceback.
        text = str(error).rpartition("UserError: ")[2].strip()
        print(f"{script}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            f"{script}: interrupted; --resume continues after the last complete epoch",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
