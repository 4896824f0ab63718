"""Train or evaluate a network with SimAM, another attention layer, or none.

Run from the root of a checkout. Without options, it trains a small network on scikit-learn's
digits. On several devices:

    torchrun --nproc-per-node=4 -m benchmarks.accuracy.train ...
"""

from benchmarks.accuracy.classification.options import PROG, parse
from benchmarks.accuracy.common.options import exit_on_user_error, require_extra


def main() -> None:
    """Train or evaluate; exit with one line on stderr if that is impossible."""
    options = parse()
    with exit_on_user_error(PROG):
        with require_extra("train"):
            from benchmarks.accuracy.classification.training import run
        run(options)


if __name__ == "__main__":
    main()
