"""What the command lines of the measuring scripts share."""

import argparse
import importlib
from pathlib import Path

from simam.messages import install_hint

RESULTS = Path(__file__).parent / "results"


def add_timing_options(
    parser: argparse.ArgumentParser, seconds: float, of_what: str, results: str
) -> None:
    """Add the options of a script that times on the CPU.

    Args:
        parser (ArgumentParser): gets --threads, --seconds, --json and --keep-memory.
        seconds (float): the default of --seconds.
        of_what (str): what takes so long, for --help.
        results (str): the file of the committed results.
    """
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: 1")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help=f"time for {of_what}; default: {seconds:g}",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / results,
        help="file to write; default: the committed results",
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="make malloc keep freed memory, which avoids page faults (glibc only)",
    )


def require_packages(parser: argparse.ArgumentParser, extra: str, *packages: str) -> None:
    """Exit with one line that names the extra to install if a package cannot be imported.

    Scripts call this after parsing, so that --help needs only torch.
    """
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}; {install_hint(extra)}\n")
