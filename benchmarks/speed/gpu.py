"""On a GPU machine: run the tests of the GPU, time one layer and whole models, print a table.

One command, under ten minutes, without a download; from a checkout that is not installed:
PYTHONPATH=src python benchmarks/gpu.py
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

from benchmarks.speed import gpu_models, gpu_op
from benchmarks.speed.timing import facts, write

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]


def run_tests(seconds: float) -> str:
    """How the tests that need a GPU end."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, text=True, stdout=subprocess.PIPE)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        print(output.decode() if isinstance(output, bytes) else output)
        return f"not through after {seconds:.0f} s"
    print(done.stdout)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Test, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=float, default=180, metavar="S", help="at most; 0: none")
    parser.add_argument("--op", type=float, default=210, metavar="S", help="no new case after")
    parser.add_argument("--models", type=float, default=120, metavar="S", help="no new case after")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, found none")
    # Backward is timed alone, so that what forward saved is used more than once.
    torch._functorch.config.donated_buffer = False

    about: dict[str, Any] = facts(
        device=torch.cuda.get_device_name(),
        date=datetime.date.today().isoformat(),
        triton=version("triton"),
        cuda=torch.version.cuda,
    )
    about["tests"] = run_tests(options.tests) if options.tests else "not run"
    measured: dict[str, list[dict[str, Any]]] = {"op": [], "models": []}
    for name, module, seconds in (
        ("op", gpu_op, options.op),
        ("models", gpu_models, options.models),
    ):
        for case in module.cases(time.perf_counter() + seconds):
            measured[name].append(case)
            write(options.json, about | {"models": measured["models"]}, measured["op"])
            print(name, *list(case.values())[:4], flush=True)

    print(f"\n{about['device']}, torch {torch.__version__}, Triton {about['triton']}")
    print("tests:", about["tests"], "\n")
    print(*gpu_op.table(measured["op"]), "", *gpu_models.table(measured["models"]), sep="\n")


if __name__ == "__main__":
    main()
