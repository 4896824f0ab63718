"""What the command lines of the measuring scripts share."""

import argparse
import importlib

from simam.messages import install_hint


def require_packages(parser: argparse.ArgumentParser, extra: str, *packages: str) -> None:
    """Exit with one line that names the extra to install if a package cannot be imported.

    Scripts call this after parsing, so that --help needs only torch.
    """
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}; {install_hint(extra)}\n")
