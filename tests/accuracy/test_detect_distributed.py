"""Detectors trained and evaluated by two processes, against one."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("torchvision", "timm", "pycocotools", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.accuracy import detect
from benchmarks.accuracy.common.distributed import distributed_context
from benchmarks.accuracy.common.sampler import DistributedBatchSampler, seed_everything
from benchmarks.accuracy.detection import shapes
from benchmarks.accuracy.detection.coco import read
from benchmarks.accuracy.detection.dataset import TrainingDataset
from benchmarks.accuracy.detection.models import build
from benchmarks.accuracy.detection.options import PROG
from benchmarks.accuracy.detection.trainer import Trainer
from tests.helpers.detection import (
    ENVIRONMENT,
    TINY_OPTIONS,
    narrow_backbones,
    run,
    skip_figures,
    tiny,
)

SPLITS = ["--splits", "train", "val"]
# Batch norms with fixed statistics: others depend on the images of a micro-batch.
TRAINING = ["--norm-eval", "--epochs", "2", "--lr", "0.001", "--warmup-steps", "0"]


def options(data: Path, output: Path) -> list[object]:
    always = ["--recipe", "shapes", "--data", data, *SPLITS, "--output", output, "--device", "cpu"]
    return [*always, *TINY_OPTIONS, *TRAINING]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, {"train": 8, "val": 3})
    return folder


@pytest.fixture(scope="module")
def torchrun_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, started as a user starts it."""
    output = tmp_path_factory.mktemp("torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "benchmarks.accuracy.detect", *map(str, options(data, output))],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1 ") == 1  # only the primary process prints
    return output


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.pth", weights_only=True)


def test_detect_on_two_processes_matches_gradient_accumulation(
    data: Path, torchrun_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_figures(monkeypatch)
    run(*options(data, tmp_path), "--accumulate", "2")
    one, two = checkpoint(tmp_path), checkpoint(torchrun_run)
    for row_of_one, row_of_two in zip(one["rows"], two["rows"], strict=True):
        assert row_of_one["loss"] == pytest.approx(row_of_two["loss"], rel=1e-4)
    seed_everything(0)
    start = build(tiny(norm_eval=True), 3).state_dict()
    weights = one["state_dict"]
    change = max((start[k] - t).abs().max() for k, t in weights.items())
    difference = max((t - two["state_dict"][k]).abs().max() for k, t in weights.items())
    assert difference < 1e-3 * change  # gradients are summed in another order


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def work(rank: int, ports: list[int], data: Path, weights: Path, folder: Path) -> None:
    """One of two processes: saves the results that the tests below check."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"

    os.environ["MASTER_PORT"] = str(ports[0])
    evaluate = ["--evaluate", "--weights", weights, "--data", data, *SPLITS]
    metrics = run(*evaluate, "--output", folder / "evaluation", "--device", "cpu")

    os.environ["MASTER_PORT"] = str(ports[1])
    with distributed_context("cpu") as dist_context, narrow_backbones():
        examples = TrainingDataset(read(data, "train", masks=True), masks=True, flip=0.0)
        seed_everything(0)
        batches = DistributedBatchSampler(8, 4, 0, rank=rank, world_size=2)
        trainer = Trainer(build(tiny(), 3), tiny(), dist_context, examples, batches)
        losses = trainer.epoch()

    os.environ["MASTER_PORT"] = str(ports[2])
    sys.argv = [PROG, *map(str, options(data, weights.parent))]
    code: Any = None
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            detect.main()
        except SystemExit as stopped:
            code = stopped.code
    results = {"metrics": metrics, "losses": losses, "state_dict": trainer.model.state_dict()}
    results |= {"exit_code": code, "stderr": stderr.getvalue()}
    torch.save(results, folder / f"{rank}.pth")


@pytest.fixture(scope="module")
def worked(data: Path, torchrun_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("work")
    ports = [free_port() for _ in range(3)]
    arguments = (ports, data, torchrun_run / "last.pth", folder)
    torch.multiprocessing.spawn(work, args=arguments, nprocs=2)
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_trainer_shares_batch_norm_statistics(worked: Path) -> None:
    first, second = results(worked)
    assert first["losses"] == second["losses"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name])


def test_evaluate_on_two_processes_matches_one(
    data: Path, torchrun_run: Path, worked: Path, tmp_path: Path
) -> None:
    """The split has three images; test_detect_evaluation proves that each is processed once."""
    weights = ["--evaluate", "--weights", torchrun_run / "last.pth", "--data", data, *SPLITS]
    expected = run(*weights, "--output", tmp_path, "--device", "cpu")
    written = json.loads((worked / "evaluation" / "evaluation.json").read_text())
    assert written == expected
    assert [result["metrics"] for result in results(worked)] == [expected, expected]


def test_detect_on_two_processes_exits_with_an_error(worked: Path) -> None:
    for result in results(worked):
        assert result["exit_code"] == 2
        assert result["stderr"].startswith(f"{PROG}: error: ")
        assert "last.pth exists; resume from it with --resume" in result["stderr"]
