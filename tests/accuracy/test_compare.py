"""The comparison of attention layers: fair, and its figures by hand."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="the scripts need timm")
Image = importlib.import_module("PIL.Image")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
compare = importlib.import_module("benchmarks.accuracy.compare")
train = importlib.import_module("benchmarks.accuracy.train")
networks = importlib.import_module("benchmarks.accuracy.classification.networks")
seeds = importlib.import_module("benchmarks.accuracy.common.sampler")

ROOT = Path(__file__).parents[1]


def log(*top1: float) -> dict[str, Any]:
    return {"command": "train.py", "rows": [{"top1": value} for value in top1]}


def test_figures_by_hand() -> None:
    runs = {"none": [log(50, 90), log(60, 92)], "simam": [log(55, 91), log(65, 95)]}
    none, simam = compare.summarize(runs, {"none": {}, "simam": {"kept_mb": 3.0}})
    assert (none["top1"], none["change"], none["change_error"]) == (91, 0, 0)
    assert none["top1_std"] == pytest.approx(math.sqrt(2))
    assert simam["top1"] == 93
    assert simam["top1_std"] == pytest.approx(math.sqrt(8))
    # By 1 and by 3 better with the same seed.
    assert simam["change"] == 2
    assert simam["change_error"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert simam["top1_of_seeds"] == [91, 95]
    assert simam["curve"] == [60, 93]
    assert simam["kept_mb"] == 3.0


def test_one_seed_has_no_deviation() -> None:
    (case,) = compare.summarize({"none": [log(90)]}, {"none": {}})
    assert math.isnan(case["top1_std"])


def test_what_is_kept_for_backward_is_counted_once() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight  # keeps x, and the weight, which is there anyway
            return y * y + y.sin()  # keeps y, three times

    model, x = Square(), torch.ones(100)
    kept = compare.kept(model, lambda: model(x).sum().backward())
    assert kept == 2 * 400


def test_images_and_weights_are_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_train", lambda trainer, *_: trainer)
    seen = {}
    for name in networks.ATTENTION:
        trainer = train.run(train.parse(["--attention", name, "--seed", "7"]))
        trainer.batches.epoch = 3
        images, labels = next(iter(trainer.loader))
        weight = trainer.model.stem[0].weight.detach()
        seen[name] = (images, labels, weight, trainer.optimizer.param_groups[0]["lr"])
    first = seen.pop("none")
    for name, other in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True)), name
        assert other[3] == first[3]


def test_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "1", "--only", "none", "simam", "--output", str(tmp_path)]
    arguments += ["--seconds", "0.1", "--dataset", "digits", "--epochs", "1", "--batch-size", "128"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here, so that sums come out the same
    compare.main()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert [case["attention"] for case in result["cases"]] == ["none", "simam"]
    none, simam = result["cases"]
    assert none["parameters"] == simam["parameters"] == 269_722
    assert simam["kept_mb"] > none["kept_mb"]
    assert none["step_ratio"] == 1
    assert f"| simam | {simam['top1']:.2f} ± nan | {simam['change']:+.2f}" in printed
    assert simam["commands"] == [
        "train.py --dataset digits --epochs 1 --batch-size 128 --attention simam --seed 0"
    ]
    assert {"date", "cores", "processor", "versions", "seeds"} <= result.keys()
    with Image.open(tmp_path / "results.png") as plot:
        assert plot.width > 1000
    # The command that is written down gives what is written down.
    again = train.parse([*simam["commands"][0].split()[1:], "--output", str(tmp_path / "again")])
    assert train.run(again)["top1"] == simam["top1"]
    # A second seed leaves the first one as it is.
    capsys.readouterr()
    before = (tmp_path / "simam-0" / "last.pth").stat().st_mtime_ns
    arguments[1] = "2"
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    compare.main()
    result = json.loads((tmp_path / "results.json").read_text())
    assert len(result["cases"][1]["top1_of_seeds"]) == 2
    assert result["cases"][1]["top1_of_seeds"][0] == simam["top1"]
    assert (tmp_path / "simam-0" / "last.pth").stat().st_mtime_ns == before


def test_a_run_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "1", "--only", "none", "--output", str(tmp_path), "--model", "resnet19"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "a run failed" in message
    assert "--model resnet19 --attention none --seed 0" in message
    assert "unknown model 'resnet19'" in (tmp_path / "none-0.txt").read_text()


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "cifar10-sample"])
def test_the_documentation_has_the_figures_of_the_runs(name: str) -> None:
    result = json.loads((ROOT / "benchmarks" / f"results-{name}.json").read_text())
    for case in result["cases"]:
        assert len(case["top1_of_seeds"]) == result["seeds"]
        assert case["top1"] == pytest.approx(sum(case["top1_of_seeds"]) / result["seeds"])
    page = (ROOT / "docs" / "results.md").read_text()
    assert compare.table(result["cases"]) in page
    assert f"--seeds {result['seeds']} " in page
    assert result["arguments"] in page
    assert result["date"] in page


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--seed=3", "--seed: expected none, seeds are counted from 0; choose how many by --seeds"),
        ("--attention", "--attention: expected none, every attention is trained; choose some by"),
        ("--evaluate", "--evaluate: expected none, this script trains"),
    ],
)
def test_what_the_comparison_chooses_is_not_to_be_given(
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
