"""Train or evaluate Faster R-CNN or Mask R-CNN with SimAM in the backbone, or without.

Run from the root of a checkout. Without options, it trains a small Mask R-CNN on drawn shapes. On
several devices:

    torchrun --nproc-per-node=4 -m benchmarks.accuracy.detect ...
"""

from benchmarks.accuracy.common.options import exit_on_user_error, require_extra
from benchmarks.accuracy.detection.options import PROG, parse


def main() -> None:
    """Train or evaluate; exit with one line on stderr if that is impossible."""
    with exit_on_user_error(PROG):
        options = parse()
        with require_extra("train"):
            from benchmarks.accuracy.detection.training import run
        run(options)


if __name__ == "__main__":
    main()
