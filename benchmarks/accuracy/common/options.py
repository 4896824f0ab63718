"""What the command lines of the scripts have in common."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simam.messages import UserError


def add_where(parser: argparse.ArgumentParser) -> Any:
    """Add the options of where a run is computed, and how fast."""
    where = parser.add_argument_group("where, and how fast")
    where.add_argument("--output", type=Path, help="folder to write to; default: under runs")
    where.add_argument("--resume", action="store_true", help="go on from the output's checkpoint")
    where.add_argument("--evaluate", action="store_true", help="only evaluate, see --weights")
    where.add_argument("--device", help="cpu or cuda; default: a GPU if there is one")
    where.add_argument("--workers", type=int, help="processes that prepare images, on each device")
    where.add_argument("--amp", choices=("none", "bfloat16", "float16"), default="none")
    where.add_argument("--tensorboard", action="store_true", help="write its events, too")
    return where


def positive(text: str) -> int:
    """The type of an option that counts."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


@contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """End the script with one line that says what cannot be done, or how to go on."""
    try:
        yield
    except UserError as error:
        # What a worker raises comes with its traceback.
        text = str(error).rpartition("UserError: ")[2].strip()
        print(f"{script}: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{script}: stopped; --resume goes on after the last whole epoch", file=sys.stderr)
        raise SystemExit(130) from None
