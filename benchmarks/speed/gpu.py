"""Test and time simam on a GPU: run the GPU tests, time one layer and whole models.

Prints tables that compare simam with its goals. Writes JSON. Takes less than ten minutes and
downloads nothing. From the root of a checkout that is not installed:

    PYTHONPATH=src python -m benchmarks.speed.gpu
"""

import argparse
import datetime
import importlib.util
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import gpu_models, gpu_op
from .options import RESULTS, require_packages
from .timing import machine_info, write_results

ROOT = Path(__file__).parents[2]


def run_tests(seconds: float) -> str:
    """Run the tests that need a GPU; return the last line of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, text=True, stdout=subprocess.PIPE)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        print(output.decode() if isinstance(output, bytes) else output)
        return f"not finished after {seconds:.0f} s"
    print(done.stdout)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Test, measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tests",
        type=float,
        default=180,
        metavar="S",
        help="stop the tests after S seconds, 0 to skip them; default: 180",
    )
    parser.add_argument(
        "--op",
        type=float,
        default=210,
        metavar="S",
        help="start no new case of the layer after S seconds; default: 210",
    )
    parser.add_argument(
        "--models",
        type=float,
        default=120,
        metavar="S",
        help="start no new case of the models after S seconds; default: 120",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / "gpu.json",
        help="file to write; default: the committed results",
    )
    options = parser.parse_args()
    require_packages(parser, "timm", "timm", "torchvision")
    if options.tests:
        require_packages(parser, "test", "pytest", "hypothesis")
    if not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, found none")
    # Backward is timed alone, several times after one forward pass, so compiled code must not
    # reuse the memory of what the forward pass saved.
    torch._functorch.config.donated_buffer = False

    info: dict[str, Any] = machine_info(
        device=torch.cuda.get_device_name(),
        date=datetime.date.today().isoformat(),
        triton=version("triton"),
        cuda=torch.version.cuda,
    )
    info["tests"] = run_tests(options.tests) if options.tests else "not run"
    measured: dict[str, list[dict[str, Any]]] = {"op": [], "models": []}
    for name, module, seconds in (
        ("op", gpu_op, options.op),
        ("models", gpu_models, options.models),
    ):
        for case in module.cases(time.perf_counter() + seconds):
            measured[name].append(case)
            write_results(options.json, info | {"models": measured["models"]}, measured["op"])
            print(name, *list(case.values())[:4], flush=True)

    print(f"\n{info['device']}, torch {torch.__version__}, Triton {info['triton']}")
    print(f"tests: {info['tests']}\n")
    print(gpu_op.goal_table(measured["op"]))
    print("\n" + gpu_models.goal_table(measured["models"]))


if __name__ == "__main__":
    main()
