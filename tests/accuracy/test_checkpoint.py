"""Checkpoints of runs: complete at every moment, and read safely."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import simam
from benchmarks.accuracy.common import checkpoint
from simam.messages import UserError

# Saves one checkpoint after another.
WRITER = """
import sys, torch
from pathlib import Path
from benchmarks.accuracy.common.checkpoint import save
number = 0
while True:
    number += 1
    tensor = torch.full((400_000,), number)
    save({"state_dict": {"weight": tensor}, "number": number}, Path(sys.argv[1]))
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.03])
def test_save_survives_kill(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "last.pth"
    roots = [str(Path(__file__).parents[2]), str(Path(simam.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(roots)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment
    )
    assert writer.stdout is not None
    with writer.stdout:
        reported = [int(writer.stdout.readline()) for _ in range(3)][-1]
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        reported = max([reported, *map(int, writer.stdout.read().split())])
    found = checkpoint.load(path)
    # The last reported save is complete; the next one may be.
    assert found["number"] in (reported, reported + 1)
    assert (found["state_dict"]["weight"] == found["number"]).all()


def test_save_interrupted_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save({"state_dict": {}, "number": 1}, path)

    def interrupt(content: object, file: object) -> None:
        file.write(b"half a check")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"state_dict": {}, "number": 2}, path)
    assert checkpoint.load(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_write_atomically_replaces_after_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    replace, fsync = os.replace, os.fsync

    def spy_replace(source: Path, target: Path) -> None:
        events.append(("replace", Path(source).read_bytes(), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    checkpoint.write_atomically(path, lambda file: file.write(b"new"))
    assert events[:2] == ["fsync", ("replace", b"new", b"old")]
    assert path.read_bytes() == b"new"


def test_load_refuses_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    with pytest.raises(UserError, match=r"cannot read .*last\.pth: No such file"):
        checkpoint.load(path)
    checkpoint.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"last\.pth is damaged or not a checkpoint"):
        checkpoint.load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"last\.pth is not the checkpoint of a run"):
        checkpoint.load(path)


def test_load_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "last.pth"
    path.write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(UserError, match=r"last\.pth is damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "trapped").exists()
