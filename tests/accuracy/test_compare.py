"""benchmarks.accuracy.compare: fair runs, figures computed by hand, and its errors."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("timm", "torchvision", "matplotlib"):
    pytest.importorskip(package, reason="the training scripts need the extra train")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from PIL import Image

import simam
from benchmarks.accuracy import compare
from benchmarks.accuracy.classification import training
from benchmarks.accuracy.classification.options import ATTENTION, parse
from benchmarks.accuracy.common.checkpoint import load
from benchmarks.speed.timing import saved_bytes
from tests.helpers.few_images import few_digits

ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.accuracy.train "


def log(*top1: float) -> dict[str, Any]:
    return {"command": COMMAND, "rows": [{"top1": value} for value in top1]}


def test_summarize_matches_hand_computation() -> None:
    runs = {"none": [log(50, 90), log(60, 92)], "simam": [log(55, 91), log(65, 95)]}
    none, simam = compare.summarize(runs, {"none": {}, "simam": {"kept_mb": 3.0}})
    assert (none["top1"], none["change"], none["change_error"]) == (91, 0, 0)
    assert none["top1_std"] == pytest.approx(math.sqrt(2))
    assert simam["top1"] == 93
    assert simam["top1_std"] == pytest.approx(math.sqrt(8))
    # Better by 1 and by 3 with the same seed.
    assert simam["change"] == 2
    assert simam["change_error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert simam["top1_of_seeds"] == [91, 95]
    assert simam["curve"] == [60, 93]
    assert simam["kept_mb"] == 3.0


def test_summarize_one_seed_has_no_deviation() -> None:
    (case,) = compare.summarize({"none": [log(90)]}, {"none": {}})
    assert math.isnan(case["top1_std"])


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight  # saves x, and the weight, which exists anyway
            return y * y + y.sin()  # saves y three times

    model, x = Square(), torch.ones(100)
    saved = saved_bytes(lambda: model(x).sum().backward(), exclude=model.parameters())
    assert saved == 2 * 400


def test_train_uses_same_images_and_weights_for_every_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "_train", lambda trainer, *_: trainer)
    seen = {}
    for name in ATTENTION:
        trainer: Any = training.run(parse(["--attention", name, "--seed", "7"]))
        trainer.batches.epoch = 3
        images, labels = next(iter(trainer.loader))
        weight = trainer.model.stem[0].weight.detach()
        seen[name] = (images, labels, weight, trainer.optimizer.param_groups[0]["lr"])
    first = seen.pop("none")
    for name, other in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True)), name
        assert other[3] == first[3]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's directory, which is not the root of the checkout."""
    monkeypatch.chdir(tmp_path)
    # Runs import the simam that is tested here, and sum in the same order.
    monkeypatch.setenv("PYTHONPATH", str(Path(simam.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_compare_digits(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data").mkdir()
    train_arguments = [*few_digits(Path("data")), "--epochs", "2"]
    arguments = ["--only", "none", "simam", "--output", "out", "--seconds", "0.1", *train_arguments]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "1", *arguments])
    compare.main()
    printed = capsys.readouterr().out
    result = json.loads(Path("out/results.json").read_text())
    assert [case["attention"] for case in result["cases"]] == ["none", "simam"]
    none, simam = result["cases"]
    assert none["parameters"] == simam["parameters"] == 269_722
    assert simam["kept_mb"] > none["kept_mb"]
    assert none["step_ratio"] == 1
    assert f"| simam | {simam['top1']:.2f} ± nan | {simam['change']:+.2f}" in printed
    command = f"{COMMAND}{shlex.join(train_arguments)} --attention simam --seed 0"
    assert simam["commands"] == [command]
    assert {"date", "cores", "processor", "versions", "seeds"} <= result.keys()
    with Image.open("out/results.png") as plot:
        assert plot.width > 1000
    # The recorded command reproduces the run.
    again = training.run(parse([*shlex.split(command)[3:], "--output", "again"]))
    recorded = load(Path("out/simam-0/last.pth"))["rows"][-1]
    assert again | {"seconds": 0} == recorded | {"seconds": 0}
    assert again["top1"] == simam["top1"]
    # A second seed leaves the run of the first one untouched.
    before = Path("out/simam-0/last.pth").stat().st_mtime_ns
    arguments.remove("none")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "2", *arguments])
    compare.main()
    (both,) = json.loads(Path("out/results.json").read_text())["cases"]
    assert len(both["top1_of_seeds"]) == 2
    assert both["top1_of_seeds"][0] == simam["top1"]
    assert Path("out/simam-0/last.pth").stat().st_mtime_ns == before
    assert Path("out/simam-1/last.pth").exists()


def test_compare_names_failed_run(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "1", "--only", "none", "--output", "out", "--model", "resnet19"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "a run failed" in message
    assert f"{COMMAND}--model resnet19 --attention none --seed 0" in message
    assert "unknown model 'resnet19'" in Path("out/none-0.txt").read_text()


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "cifar10-sample"])
def test_documentation_shows_recorded_results(name: str) -> None:
    path = ROOT / "benchmarks" / "accuracy" / "results" / f"{name}.json"
    result = json.loads(path.read_text())
    for case in result["cases"]:
        assert len(case["top1_of_seeds"]) == result["seeds"]
        assert case["top1"] == pytest.approx(sum(case["top1_of_seeds"]) / result["seeds"])
        for seed, command in enumerate(case["commands"]):
            expected = f"{result['arguments']} --attention {case['attention']} --seed {seed}"
            assert command == COMMAND + expected
    page = (ROOT / "docs" / "results.md").read_text()
    assert compare.markdown_table(result["cases"]) in page
    assert f"--seeds {result['seeds']} " in page
    assert result["arguments"] in page
    assert result["date"] in page


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--seed=3", "--seed: expected none, seeds are counted from 0; choose their number with"),
        ("--attention", "--attention: expected none, every attention layer is trained; choose"),
        ("--evaluate", "--evaluate: expected none, this script trains"),
    ],
)
def test_compare_refuses_reserved_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(tmp_path / "out"), argument])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
