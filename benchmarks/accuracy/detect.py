"""Train and evaluate Faster R-CNN and Mask R-CNN with SimAM in the backbone, by the paper's recipe.

Run from the root of a checkout. Without arguments, trains a small Mask R-CNN on drawn shapes:

    python -m benchmarks.accuracy.detect
    torchrun --nproc-per-node=4 -m benchmarks.accuracy.detect --data coco
"""

from benchmarks.accuracy.common.options import exit_on_user_error, require_extra
from benchmarks.accuracy.detection.options import parse


def main() -> None:
    """Parse the command line, then train or evaluate; exit with one line on a user error."""
    with exit_on_user_error("detect.py"):
        options = parse(__doc__.partition("\n\n")[0])
        with require_extra("train"):  # --help works without it
            from benchmarks.accuracy.detection.experiment import run
        run(options)


if __name__ == "__main__":
    main()
