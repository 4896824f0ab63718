"""Checkpoints of runs: whole at every moment, and read safely."""

import importlib
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
from simam.messages import UserError

pytest.importorskip("timm", reason="the scripts need timm")
files = importlib.import_module("benchmarks.accuracy.common.checkpoint")

# Writes generation after generation, the first one at once.
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


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.007, 0.013, 0.03])
def test_killed_in_the_middle_of_a_save(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "last.pth"
    folders = [str(Path(files.__file__).parents[1]), str(Path(simam.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment
    )
    assert writer.stdout is not None
    with writer.stdout:
        told = [int(writer.stdout.readline()) for _ in range(3)][-1]
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        told = max([told, *map(int, writer.stdout.read().split())])
    found = files.load(path)
    # All that the writer told of is there; the next one may be.
    assert found["number"] in (told, told + 1)
    assert (found["state_dict"]["weight"] == found["number"]).all()


def test_killed_before_the_new_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    files.save({"state_dict": {}, "number": 1}, path)

    def break_off(content: object, file: object) -> None:
        file.write(b"half a check")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        files.save({"state_dict": {}, "number": 2}, path)
    assert files.load(path)["number"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_what_is_written_takes_the_place_in_one_step(
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
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert events[:2] == ["fsync", ("replace", b"new", b"old")]
    assert path.read_bytes() == b"new"


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    with pytest.raises(UserError, match=r"cannot read .*last\.pth: No such file"):
        files.load(path)
    files.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"last\.pth is damaged or not a checkpoint"):
        files.load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"last\.pth is not the checkpoint of a run"):
        files.load(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "last.pth"
    path.write_bytes(pickle.dumps({"state_dict": Trap()}))
    with pytest.raises(UserError, match=r"last\.pth is damaged or not a checkpoint"):
        files.load(path)
    assert not (tmp_path / "trapped").exists()
