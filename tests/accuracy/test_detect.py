"""detect.py: training, exact resuming, evaluation of checkpoints, and messages to the user."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("torchvision", "timm", "pycocotools", "matplotlib"):
    pytest.importorskip(name)

from benchmarks.accuracy import detect
from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.common.sampler import DistributedBatchSampler, seed_everything
from benchmarks.accuracy.detection import shapes
from benchmarks.accuracy.detection.coco import read
from benchmarks.accuracy.detection.dataset import TrainingDataset
from benchmarks.accuracy.detection.models import build
from benchmarks.accuracy.detection.options import PROG, parse
from benchmarks.accuracy.detection.trainer import Trainer
from simam.messages import UserError, install_hint
from tests.helpers.detection import (
    ENVIRONMENT,
    TINY_OPTIONS,
    Capture,
    content,
    error_message,
    narrow_backbones,
    run,
    skip_figures,
    store,
    tiny,
)

ONE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))
SPLITS = ["--splits", "train", "val"]


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    with narrow_backbones():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, {"train": 8, "val": 3})
    return folder


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_figures(monkeypatch)


def options(data: Path, output: Path, *more: object) -> list[object]:
    always = ["--recipe", "shapes", "--data", data, *SPLITS, "--output", output, "--device", "cpu"]
    return [*always, *TINY_OPTIONS, "--epochs", "3", *more]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / f"{name}.pth", weights_only=True)


def equal(first: Any, second: Any) -> bool:
    """Whether two checkpoints, or values of them, are equal bit by bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return all(equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def without_seconds(content: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in content["rows"]]
    return content | {"rows": rows}


@pytest.fixture(scope="module")
def finished_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three epochs."""
    output = tmp_path_factory.mktemp("finished")
    metrics = run(*options(data, output))
    assert metrics == json.loads((output / "evaluation.json").read_text())
    return output


def test_detect_writes_log_curves_weights_and_settings(finished_run: Path) -> None:
    rows = list(csv.DictReader((finished_run / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["steps"] for row in rows] == ["2", "4", "6"]
    assert {"loss", "loss_mask", "box AP", "mask AP75", "lr", "seconds"} <= set(rows[0])
    content = checkpoint(finished_run)
    assert (content["arch"], content["epoch"], content["step"]) == ("maskrcnn_resnet18_fpn", 3, 6)
    assert [str(row["loss"]) for row in content["rows"]] == [row["loss"] for row in rows]
    best = max(content["rows"], key=lambda row: row["box AP"])  # the first of equal ones
    assert checkpoint(finished_run, "best")["epoch"] == best["epoch"]
    settings = json.loads((finished_run / "settings.json").read_text())
    assert settings["attention"] == "simam"
    assert settings["categories"] == {"1": "circle", "2": "rectangle", "3": "triangle"}
    for file in ("curves.png", "detections.png", "best.pth"):
        assert (finished_run / file).stat().st_size > 1000


@pytest.mark.usefixtures("no_figures")
def test_resume_matches_uninterrupted_run(
    data: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls, accumulate = [], Trainer._accumulate

        def interrupted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:  # the middle of the second epoch
                raise KeyboardInterrupt
            return accumulate(*arguments)

        patch.setattr(Trainer, "_accumulate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*options(data, tmp_path))
    assert checkpoint(tmp_path)["epoch"] == 1
    run(*options(data, tmp_path, "--resume", "--workers", "1"))
    for name in ("last", "best"):
        resumed, uninterrupted = checkpoint(tmp_path, name), checkpoint(finished_run, name)
        assert equal(without_seconds(resumed), without_seconds(uninterrupted))


@pytest.mark.usefixtures("no_figures")
def test_seed_changes_the_run(data: Path, finished_run: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--seed", "1", "--epochs", "1"))
    assert checkpoint(tmp_path)["rows"][0]["loss"] != checkpoint(finished_run)["rows"][0]["loss"]


def test_resume_of_finished_run_trains_nothing(
    data: Path, finished_run: Path, capsys: Capture
) -> None:
    before = (finished_run / "last.pth").stat().st_mtime_ns
    assert run(*options(data, finished_run, "--resume")) is None
    assert "after epoch 3" in capsys.readouterr().out
    assert (finished_run / "last.pth").stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_figures")
def test_resume_without_checkpoint_starts_a_run(data: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--epochs", "1", "--resume"))
    assert checkpoint(tmp_path)["epoch"] == 1


def test_detect_refuses_to_overwrite_a_checkpoint(data: Path, finished_run: Path) -> None:
    with pytest.raises(UserError, match=r"last.pth exists; resume from it with --resume, or"):
        run(*options(data, finished_run))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--lr", "0.5"], "lr was 0.02, now 0.5"),
        (["--attention", "none"], "attention was simam, now none"),
        (["--epochs", "4"], "epochs was 3, now 4; milestones was ("),
        (["--seed", "2"], "seed was 0, now 2"),
        (["--accumulate", "2"], "micro_batch_size was 4, now 2"),
        (["--amp", "bfloat16"], "amp was none, now bfloat16"),
    ],
)
def test_resume_refuses_other_settings(
    data: Path, finished_run: Path, changes: list[str], text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"was written with other settings: {text}")):
        run(*options(data, finished_run, "--resume", *changes))


def test_resume_refuses_other_annotations(finished_run: Path, tmp_path: Path) -> None:
    shapes.write(tmp_path, {"train": 8, "val": 3}, seed=1)
    with pytest.raises(UserError, match=r"other settings: annotations was .*, now "):
        run(*options(tmp_path, finished_run, "--resume"))


def test_trainer_overfits_a_few_images(data: Path) -> None:
    recipe = tiny(batch_size=2, epochs=16, lr=0.01, milestones=(20,))
    examples = TrainingDataset(read(data, "train", masks=True), masks=True, flip=0.0)
    seed_everything(0)
    batches = DistributedBatchSampler(8, 2, 0)
    trainer = Trainer(build(recipe, 3), recipe, ONE_PROCESS, examples, batches)
    losses = [trainer.epoch() for _ in range(recipe.epochs)]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    for name in ("loss_classifier", "loss_mask", "loss_objectness"):
        assert losses[-1][name] < losses[0][name]
    terms = {name: value for name, value in losses[0].items() if name != "loss"}
    assert len(terms) == 5
    assert losses[0]["loss"] == pytest.approx(sum(terms.values()))


def test_detect_refuses_a_loss_that_is_not_finite(data: Path, tmp_path: Path) -> None:
    text = r"the loss is (nan|inf) at step \d \(loss_classifier .*\); lower --lr, or train with"
    with pytest.raises(UserError, match=text):
        run(*options(data, tmp_path, "--lr", "1e6", "--warmup-steps", "0"))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_detect_trains_in_mixed_precision(amp: str, data: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--amp", amp, "--epochs", "1", "--lr", "0.001"))
    content = checkpoint(tmp_path)
    assert bool(content["scaler"]) == (amp == "float16")
    assert all(t.dtype in (torch.float32, torch.int64) for t in content["state_dict"].values())


# Evaluation of a checkpoint


def test_evaluate_needs_only_the_checkpoint(
    data: Path, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = json.loads((finished_run / "evaluation.json").read_text())
    evaluate = ["--evaluate", "--weights", finished_run / "last.pth", "--data", data, *SPLITS]
    assert run(*evaluate, "--output", tmp_path) == before
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["AP", "AP50", "AP75"]
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["box", "mask"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--attention", "none"], "--attention none: {} was trained with simam; leave the opt"),
        (["--e-lambda", "0.5"], "--e-lambda 0.5: {} was trained with 0.1; leave the option out"),
        (["--model", "maskrcnn_resnet34_fpn"], "{} was trained with maskrcnn_resnet18_fpn"),
    ],
)
def test_evaluate_refuses_options_that_contradict_the_checkpoint(
    finished_run: Path, data: Path, changes: list[str], text: str
) -> None:
    weights = finished_run / "last.pth"
    with pytest.raises(UserError, match=re.escape(text.format(weights))):
        run("--evaluate", "--weights", weights, "--data", data, *SPLITS, *changes)


def test_evaluate_refuses_other_categories(finished_run: Path, tmp_path: Path) -> None:
    store(tmp_path, content())
    with pytest.raises(UserError, match=r"was trained on 3 categories .1 circle, 2 rectangle, 3"):
        run("--evaluate", "--weights", finished_run / "last.pth", "--data", tmp_path, *SPLITS)


def test_evaluate_refuses_weights_of_another_network(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "classifier.pth"
    torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, path)
    with pytest.raises(UserError, match=f"the weights in {path} are not those of this model"):
        run("--evaluate", "--weights", path, "--data", data, *SPLITS, "--recipe", "shapes")


# Output and errors of the command


def test_detect_draws_shapes_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes.write, "__defaults__", ({"train": 4, "val": 2},))
    monkeypatch.setattr("sys.argv", [PROG, *TINY_OPTIONS, "--epochs", "2"])
    detect.main()
    folder = Path("runs/shapes-maskrcnn_resnet18_fpn-simam-seed0")
    assert {path.name for path in (folder / "shapes").iterdir()} == {"annotations", "train", "val"}
    last_line = capsys.readouterr().out.splitlines()[-1]
    summary = (
        r"box AP \d\.\d{3} after epoch 1, \d\.\d{3} after epoch 2, \d\.\d{3} at best; mask AP .*; "
        r"\d+\.\d minutes; see runs/shapes-maskrcnn_resnet18_fpn-simam-seed0"
    )
    assert re.fullmatch(summary, last_line)
    monkeypatch.setattr("sys.argv", [PROG, "--evaluate", "--weights", f"{folder}/best.pth"])
    detect.main()
    assert str(folder / "evaluation.json") in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_detect_names_an_unreadable_image(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shapes.write(tmp_path, {"train": 4, "val": 2})
    image = tmp_path / "train" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:1000])
    arguments = options(tmp_path, tmp_path / "run", "--workers", workers)
    message = error_message(capsys, monkeypatch, *arguments)
    assert message.startswith(f"cannot read the image {image}: OSError: image file is truncated")
    assert "\n" not in message


@pytest.mark.usefixtures("no_figures")
def test_detect_warns_about_empty_boxes(tmp_path: Path, capsys: Capture) -> None:
    shapes.write(tmp_path, {"train": 4, "val": 2})
    file = tmp_path / "annotations" / "instances_train.json"
    written = json.loads(file.read_text())
    written["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(written))
    run(*options(tmp_path, tmp_path / "run", "--epochs", "1"))
    assert capsys.readouterr().err == (
        f"{PROG}: warning: {file}: skipped 1 annotations with an empty box (1)\n"
    )


def test_detect_refuses_splits_with_different_categories(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"train": 4})
    store(tmp_path, content())
    with pytest.raises(UserError, match=r"has 3 categories \(1 circle, .*instances_val.json has 3"):
        run(*options(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3: expected a multiple of 2"),
        (["--batch-size", "64"], "--batch-size 64: expected at most 8, the number of images with"),
        (["--lr", "-1"], "--lr: expected more than 0, got -1.0"),
        (["--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["--backbone-weights", "gone.pth"], "cannot read gone.pth: No such file or directory"),
        (["--data", "gone"], "cannot read gone/annotations/instances_train.json: No such file"),
    ],
)
def test_detect_refuses_impossible_requests(
    data: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    text: str,
) -> None:
    assert text in error_message(capsys, monkeypatch, *options(data, tmp_path, *changes))
    assert not (tmp_path / "last.pth").exists()


def usage_error(capsys: Capture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--evaluate"], "expected --evaluate and --weights FILE together, got one of them"),
        (["--weights", "a.pth"], "expected --evaluate and --weights FILE together"),
        (["--evaluate", "--weights", "a", "--resume"], "--evaluate: expected neither --resume nor"),
        (["--splits", "a", "b"], "--splits: expected --data DIR with it, got none"),
        (["--recipe", "paper"], "argument --recipe: invalid choice: 'paper'"),
        (["--atention", "simam"], "unrecognized arguments: --atention simam"),
        (["--accumulate", "0"], "argument --accumulate: expected at least 1, got 0"),
    ],
)
def test_parse_refuses_wrong_options(capsys: Capture, arguments: list[str], text: str) -> None:
    assert text in usage_error(capsys, *arguments)


def test_parse_collects_overrides_of_the_recipe() -> None:
    arguments = "--milestones 4 5.5 --anchor-sizes 8 16 32 64 99 --no-norm-eval --flip 0"
    assert parse(arguments.split()).overrides == {
        "milestones": (4.0, 5.5),
        "anchor_sizes": (8, 16, 32, 64, 99),
        "norm_eval": False,
        "flip": 0.0,
    }


def test_parse_chooses_the_paper_recipe_for_coco() -> None:
    parsed = parse(["--data", "/data/coco"])
    assert parsed.recipe == "paper-coco"
    assert parsed.splits == ("train2017", "val2017")
    assert parsed.output == Path("runs/coco-fasterrcnn_resnet50_fpn-simam-seed0")


# Missing packages

BLOCKED = ("timm", "torchvision", "pycocotools", "numpy", "PIL", "matplotlib", "tqdm")


def detect_without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.accuracy.detect` as if packages were not installed."""
    # -W ignore, since torch itself warns if NumPy is missing.
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({packages}));"
        "runpy.run_module('benchmarks.accuracy.detect', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


def test_help_needs_only_torch() -> None:
    done = detect_without(BLOCKED, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train or evaluate Faster R-CNN or Mask R-CNN" in done.stdout
    assert "--backbone-weights" in done.stdout


def test_detect_without_its_packages_exits_with_an_error() -> None:
    done = detect_without(BLOCKED)
    assert (done.returncode, done.stdout) == (2, "")
    message = done.stderr.removesuffix("\n")
    assert "\n" not in message
    assert message.startswith(f"{PROG}: error: ")
    assert message.endswith(f"; {install_hint('train')}")


def test_detect_names_a_missing_package(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("training", "dataset"):  # import them again
        monkeypatch.delitem(sys.modules, f"benchmarks.accuracy.detection.{module}")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    message = error_message(capsys, monkeypatch)
    assert "pycocotools" in message
    assert message.endswith(f"; {install_hint('train')}")
