"""Training detectors: that they learn, go on exactly, share work, and say what is wrong."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("torchvision", "timm", "pycocotools", "matplotlib"):
    pytest.importorskip(name)

import simam
from benchmarks.accuracy import detect
from benchmarks.accuracy.common.distributed import DistributedContext
from benchmarks.accuracy.common.sampler import DistributedBatchSampler, seed_everything
from benchmarks.accuracy.detection import shapes
from benchmarks.accuracy.detection.coco import read
from benchmarks.accuracy.detection.dataset import Examples
from benchmarks.accuracy.detection.models import build
from benchmarks.accuracy.detection.trainer import Trainer
from simam.messages import UserError
from tests.helpers.detection import TINY_OPTIONS, Capture, content, message, run, store, tiny

HERE = DistributedContext(0, 1, torch.device("cpu"))
SPLITS = ["--splits", "train", "val"]
FOLDERS = [str(Path(module.__file__).parents[n]) for n, module in enumerate((detect, simam))]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, {"train": 8, "val": 3})
    return folder


def options(data: Path, output: Path, *more: object) -> list[object]:
    always = ["--recipe", "shapes", "--data", data, *SPLITS, "--output", output, "--device", "cpu"]
    return [*always, *TINY_OPTIONS, "--epochs", "3", *more]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / f"{name}.pth", weights_only=True)


def same(first: Any, second: Any) -> bool:
    """Whether two checkpoints, or parts of them, are equal bit by bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


def without_seconds(content: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in content["rows"]]
    return content | {"rows": rows}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the beginning to the end."""
    output = tmp_path_factory.mktemp("whole")
    figures = run(*options(data, output))
    assert figures == json.loads((output / "evaluation.json").read_text())
    return output


def test_a_run_leaves_its_log_its_curves_its_weights_and_its_settings(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["steps"] for row in rows] == ["2", "4", "6"]
    assert {"loss", "loss_mask", "box AP", "mask AP75", "lr", "seconds"} <= set(rows[0])
    content = checkpoint(whole)
    assert (content["arch"], content["epoch"], content["step"]) == ("maskrcnn_resnet18_fpn", 3, 6)
    assert [str(row["loss"]) for row in content["rows"]] == [row["loss"] for row in rows]
    best = max(content["rows"], key=lambda row: row["box AP"])  # the first of equal ones
    assert checkpoint(whole, "best")["epoch"] == best["epoch"]
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["attention"] == "simam"
    assert settings["categories"] == {"1": "circle", "2": "rectangle", "3": "triangle"}
    for file in ("curves.png", "detections.png", "best.pth"):
        assert (whole / file).stat().st_size > 1000


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        turns, taken = [], Trainer._turn

        def turn(*arguments: Any) -> Any:
            turns.append(1)
            if len(turns) == 4:  # the middle of the second epoch
                raise KeyboardInterrupt
            return taken(*arguments)

        patch.setattr(Trainer, "_turn", turn)
        with pytest.raises(KeyboardInterrupt):
            run(*options(data, tmp_path))
    assert checkpoint(tmp_path)["epoch"] == 1
    run(*options(data, tmp_path, "--resume", "--workers", "1"))
    assert same(without_seconds(checkpoint(tmp_path)), without_seconds(checkpoint(whole)))
    assert same(
        without_seconds(checkpoint(tmp_path, "best")), without_seconds(checkpoint(whole, "best"))
    )


def test_another_seed_is_another_run(data: Path, whole: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--seed", "1", "--epochs", "1"))
    assert checkpoint(tmp_path)["rows"][0]["loss"] != checkpoint(whole)["rows"][0]["loss"]


def test_a_run_that_is_done_has_nothing_to_train(data: Path, whole: Path, capsys: Capture) -> None:
    before = (whole / "last.pth").stat().st_mtime_ns
    assert run(*options(data, whole, "--resume")) is None
    assert "after epoch 3" in capsys.readouterr().out
    assert (whole / "last.pth").stat().st_mtime_ns == before


def test_resume_without_a_checkpoint_starts(data: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--epochs", "1", "--resume"))
    assert checkpoint(tmp_path)["epoch"] == 1


def test_a_checkpoint_is_not_overwritten(data: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"last.pth exists; resume from it with --resume, or"):
        run(*options(data, whole))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--lr", "0.5"], "lr was 0.02, now 0.5"),
        (["--attention", "none"], "attention was simam, now none"),
        (["--epochs", "4"], "epochs was 3, now 4; milestones was ("),
        (["--seed", "2"], "seed was 0, now 2"),
        (["--accumulate", "2"], "images_at_once was 4, now 2"),
        (["--amp", "bfloat16"], "amp was none, now bfloat16"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    data: Path, whole: Path, changes: list[str], text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"was written with other settings: {text}")):
        run(*options(data, whole, "--resume", *changes))


def test_a_run_does_not_go_on_with_other_annotations(whole: Path, tmp_path: Path) -> None:
    shapes.write(tmp_path, {"train": 8, "val": 3}, seed=1)
    with pytest.raises(UserError, match=r"other settings: annotations was .*, now "):
        run(*options(tmp_path, whole, "--resume"))


def test_losses_fall_on_images_that_are_learned_by_heart(data: Path) -> None:
    recipe = tiny(batch_size=2, epochs=8, lr=0.005, milestones=(20,))
    examples = Examples(read(data, "train", masks=True), masks=True, flip=0.0)
    seed_everything(0)
    trainer = Trainer(build(recipe, 3), recipe, HERE, examples, DistributedBatchSampler(8, 2, 0))
    losses = [trainer.epoch() for _ in range(recipe.epochs)]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    for name in ("loss_classifier", "loss_mask", "loss_objectness"):
        assert losses[-1][name] < losses[0][name]
    parts = {name: value for name, value in losses[0].items() if name != "loss"}
    assert len(parts) == 5
    assert losses[0]["loss"] == pytest.approx(sum(parts.values()))


def test_a_loss_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    text = r"the loss is (nan|inf) at step \d \(loss_classifier .*\); lower --lr, or train with"
    with pytest.raises(UserError, match=text):
        run(*options(data, tmp_path, "--lr", "1e6", "--warmup-steps", "0"))


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """detect.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*command, detect.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


# Norms that keep their statistics, as others would see another half of the batch.
SHARED = ["--norm-eval", "--epochs", "2", "--lr", "0.001", "--warmup-steps", "0"]


@pytest.fixture(scope="module")
def shared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    output = tmp_path_factory.mktemp("shared")
    done = torchrun(*options(data, output, *SHARED))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1 ") == 1  # the first process alone prints
    return output


def test_two_processes_train_as_one_that_takes_two_turns(
    data: Path, shared: Path, tmp_path: Path
) -> None:
    run(*options(data, tmp_path, *SHARED, "--accumulate", "2"))
    alone, together = checkpoint(tmp_path), checkpoint(shared)
    for one, two in zip(alone["rows"], together["rows"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    start = tiny_start()
    moved = max((start[k] - t).abs().max() for k, t in alone["state_dict"].items())
    apart = max((t - together["state_dict"][k]).abs().max() for k, t in alone["state_dict"].items())
    assert apart < 1e-3 * moved  # sums of gradients in another order


def tiny_start() -> dict[str, torch.Tensor]:
    seed_everything(0)
    return build(tiny(norm_eval=True), 3).state_dict()


def work(rank: int, data: str, folder: str) -> None:
    """One of two processes whose norms see other images."""
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        examples = Examples(read(Path(data), "train", masks=True), masks=True, flip=0.0)
        seed_everything(0)
        batches = DistributedBatchSampler(8, 4, 0, rank=rank, world_size=2)
        here = DistributedContext(rank, 2, torch.device("cpu"))
        trainer = Trainer(build(tiny(), 3), tiny(), here, examples, batches)
        losses = trainer.epoch()
        torch.save({"losses": losses, "state_dict": trainer.model.state_dict()}, f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_evaluate_the_same_network(data: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(data), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / rank, weights_only=True) for rank in "01")
    assert same(first, second)


def test_two_processes_evaluate_as_one(data: Path, shared: Path, tmp_path: Path) -> None:
    """Three images; that each is seen once, test_detect_evaluation tells."""
    weights = ["--evaluate", "--weights", shared / "last.pth", "--data", data, *SPLITS]
    done = torchrun(*weights, "--output", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    alone = run(*weights, "--output", tmp_path / "alone", "--device", "cpu")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == alone


def test_an_error_of_two_processes(data: Path, shared: Path) -> None:
    done = torchrun(*options(data, shared, *SHARED))
    assert done.returncode != 0
    assert "detect.py: error: " in done.stderr
    assert "last.pth exists; resume from it with --resume" in done.stderr


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision(amp: str, data: Path, tmp_path: Path) -> None:
    run(*options(data, tmp_path, "--amp", amp, "--epochs", "1", "--lr", "0.001"))
    content = checkpoint(tmp_path)
    assert bool(content["scaler"]) == (amp == "float16")
    assert all(t.dtype in (torch.float32, torch.int64) for t in content["state_dict"].values())


# Evaluation of a checkpoint


def test_the_evaluation_of_a_checkpoint_needs_no_other_options(
    data: Path, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = json.loads((whole / "evaluation.json").read_text())
    evaluate = ["--evaluate", "--weights", whole / "last.pth", "--data", data, *SPLITS]
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
def test_a_checkpoint_is_not_evaluated_as_another_detector(
    whole: Path, data: Path, changes: list[str], text: str
) -> None:
    weights = whole / "last.pth"
    with pytest.raises(UserError, match=re.escape(text.format(weights))):
        run("--evaluate", "--weights", weights, "--data", data, *SPLITS, *changes)


def test_a_checkpoint_is_not_evaluated_on_other_categories(whole: Path, tmp_path: Path) -> None:
    store(tmp_path, content())
    with pytest.raises(UserError, match=r"was trained on 3 categories .1 circle, 2 rectangle, 3"):
        run("--evaluate", "--weights", whole / "last.pth", "--data", tmp_path, *SPLITS)


def test_weights_of_another_network(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "classifier.pth"
    torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, path)
    with pytest.raises(UserError, match=f"the weights in {path} are not those of this model"):
        run("--evaluate", "--weights", path, "--data", data, *SPLITS, "--recipe", "shapes")


# What main says


def test_without_data_shapes_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes.write, "__defaults__", ({"train": 4, "val": 2},))
    monkeypatch.setattr("sys.argv", ["detect.py", *TINY_OPTIONS, "--epochs", "2"])
    detect.main()
    folder = Path("runs/shapes-maskrcnn_resnet18_fpn-simam-seed0")
    assert {path.name for path in (folder / "shapes").iterdir()} == {"annotations", "train", "val"}
    last = capsys.readouterr().out.splitlines()[-1]
    closing = (
        r"box AP \d\.\d{3} after epoch 1, \d\.\d{3} after epoch 2, \d\.\d{3} at best; mask AP .*; "
        r"\d+\.\d minutes; see runs/shapes-maskrcnn_resnet18_fpn-simam-seed0"
    )
    assert re.fullmatch(closing, last)
    monkeypatch.setattr("sys.argv", ["x", "--evaluate", "--weights", f"{folder}/best.pth"])
    detect.main()
    assert str(folder / "evaluation.json") in capsys.readouterr().out


def test_an_unreadable_image_is_named_whoever_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shapes.write(tmp_path, {"train": 4, "val": 2})
    image = tmp_path / "train" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:1000])
    for workers in (0, 1):
        said = message(
            capsys, monkeypatch, *options(tmp_path, tmp_path / "run", "--workers", workers)
        )
        assert said.startswith(f"cannot read the image {image}: OSError: image file is truncated")
        assert "\n" not in said


def test_empty_boxes_are_reported_and_the_run_goes_on(tmp_path: Path, capsys: Capture) -> None:
    shapes.write(tmp_path, {"train": 4, "val": 2})
    file = tmp_path / "annotations" / "instances_train.json"
    written = json.loads(file.read_text())
    written["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(written))
    run(*options(tmp_path, tmp_path / "run", "--epochs", "1"))
    assert capsys.readouterr().err == (
        f"detect.py: warning: {file}: left out 1 annotations with an empty box (1)\n"
    )


def test_categories_must_be_the_same_in_both_parts(tmp_path: Path) -> None:
    shapes.write(tmp_path, {"train": 4})
    store(tmp_path, content())
    with pytest.raises(UserError, match=r"has 3 categories \(1 circle, .*instances_val.json has 3"):
        run(*options(tmp_path, tmp_path / "run"))


def usage(capsys: Capture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        detect.parse("", list(arguments))
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
def test_options_that_do_not_fit(capsys: Capture, arguments: list[str], text: str) -> None:
    assert text in usage(capsys, *arguments)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3: expected a multiple of 2"),
        (["--batch-size", "64"], "--batch-size 64: expected at most 8, as many as there are im"),
        (["--lr", "-1"], "--lr: expected more than 0, got -1.0"),
        (["--device", "gpu"], "--device: expected cpu or cuda, got 'gpu'"),
        (["--backbone-weights", "gone.pth"], "cannot read gone.pth: No such file or directory"),
        (["--data", "gone"], "cannot read gone/annotations/instances_train.json: No such file"),
    ],
)
def test_what_cannot_be_done(
    data: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    text: str,
) -> None:
    assert text in message(capsys, monkeypatch, *options(data, tmp_path, *changes))
    assert not (tmp_path / "last.pth").exists()


def test_every_number_of_a_recipe_is_an_option() -> None:
    given = detect.parse(
        "",
        [
            "--milestones",
            "4",
            "5.5",
            "--anchor-sizes",
            "8",
            "16",
            "32",
            "64",
            "99",
            "--no-norm-eval",
            "--flip",
            "0",
        ],
    )
    assert given.numbers == {
        "milestones": (4.0, 5.5),
        "anchor_sizes": (8, 16, 32, 64, 99),
        "norm_eval": False,
        "flip": 0.0,
    }


def test_coco_is_trained_on_by_the_recipe_of_the_paper() -> None:
    given = detect.parse("", ["--data", "/data/coco"])
    assert given.recipe == "paper-coco"
    assert given.splits == ("train2017", "val2017")
    assert given.output == Path("runs/coco-fasterrcnn_resnet50_fpn-simam-seed0")


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    code = "import sys, runpy; sys.modules['pycocotools'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, detect.__file__],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("detect.py: error: ")
    assert "pycocotools" in done.stderr
    assert done.stderr.endswith('pip install "simam[train]"\n')
