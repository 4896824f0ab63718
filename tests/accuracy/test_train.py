"""benchmarks.accuracy.train: what it learns, how it resumes, and its errors."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

for package in ("numpy", "timm", "torchvision", "matplotlib"):
    pytest.importorskip(package, reason="the training scripts need the extra train")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import numpy as np
from PIL import Image

import simam
from benchmarks.accuracy import train
from benchmarks.accuracy.classification import cifar, datasets, networks, training
from benchmarks.accuracy.classification.options import parse
from benchmarks.accuracy.classification.recipes import RECIPES
from benchmarks.accuracy.classification.trainer import Trainer, evaluate
from benchmarks.accuracy.common.checkpoint import load
from benchmarks.accuracy.common.distributed import DistributedContext
from simam.messages import UserError
from tests.helpers.authors_networks import filled, publish
from tests.helpers.few_images import few_digits

MODULE = "benchmarks.accuracy.train"
COMMAND = [sys.executable, "-m", MODULE]
# Child processes import this checkout and the simam that is tested, and sum in the same order.
ROOTS = [str(Path(__file__).parents[2]), str(Path(simam.__file__).parents[1])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(ROOTS), "OMP_NUM_THREADS": "1"}


class Tiny(nn.Module):
    """A network with everything that a run has to keep: norms, dropout, a block for SimAM."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, 1, 1)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.conv3(self.bn2(self.conv2(x)).relu())).relu()
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", Tiny)
    monkeypatch.setitem(networks.NETWORKS, "resnet8", partial(cifar.ResNet, cifar.Block, 1))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that select 256 digits to train on and 61 to test on."""
    return few_digits(tmp_path_factory.mktemp("digits"))


class Run(Protocol):
    def __call__(self, output: Path, *arguments: str) -> dict[str, Any]: ...


@pytest.fixture
def run(few: list[str]) -> Run:
    """Train in the tests' process; by default the tiny network, for two epochs of few digits."""

    def run(output: Path, *arguments: str) -> dict[str, Any]:
        defaults = ["--model", "tiny", "--epochs", "2", *few]
        return training.run(parse([*defaults, *arguments, "--output", str(output)]))

    return run


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Bit for bit, except how long it took."""
    assert type(found) is type(expected), path
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), path
        for key in found.keys() - {"seconds"}:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}.{i}")
    elif isinstance(found, Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def test_train_learns_digits_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    done = subprocess.run(COMMAND, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a progress bar is for terminals
    (folder,) = (tmp_path / "runs").iterdir()
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 16))
    assert float(rows[-1]["top1"]) > 97
    assert time.perf_counter() - start < 600  # two minutes on two idle cores
    assert f"top-1 {float(rows[-1]['top1']):.2f} %" in done.stdout.splitlines()[-1]
    assert sorted(file.name for file in folder.iterdir()) == [
        "best.pth", "curves.png", "last.pth", "log.csv", "settings.json",
    ]  # fmt: skip
    with Image.open(folder / "curves.png") as curves:
        assert curves.width > 1000
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["attention"], settings["model"]) == ("simam", "cifar_resnet20")
    # The saved weights score what the last row of the log says.
    training.run(parse(["--evaluate", "--weights", str(folder / "last.pth")]))
    row = rows[-1]
    assert capsys.readouterr().out == (
        f"top-1 {float(row['top1']):.2f} %, top-5 {float(row['top5']):.2f} %, "
        f"loss {float(row['loss']):.4f}\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        "--attention simam --ema 0.9 --recipe paper-cifar --epochs 4",
        "--attention cbam --accumulate 2 --amp bfloat16 --channels-last --model resnet8 --epochs 3",
    ],
    ids=["simam", "cbam"],
)
def test_resume_matches_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, options: str
) -> None:
    run(tmp_path / "whole", *options.split())
    epoch, calls = Trainer.epoch, 0

    def interrupt(trainer: Trainer, number: int, total_steps: int) -> dict[str, float]:
        nonlocal calls
        calls += 1
        figures = epoch(trainer, number, total_steps)
        if calls == 3:  # trained, but not yet saved
            raise KeyboardInterrupt
        return figures

    monkeypatch.setattr(Trainer, "epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", *options.split())
    assert load(tmp_path / "resumed" / "last.pth")["epoch"] == 2
    run(tmp_path / "resumed", *options.split(), "--resume")
    for name in ("last.pth", "best.pth"):
        assert_same(*(load(tmp_path / folder / name) for folder in ("resumed", "whole")))
    logs = [(tmp_path / f / "log.csv").read_text().splitlines() for f in ("resumed", "whole")]
    assert [line.rpartition(",")[0] for line in logs[0]] == [
        line.rpartition(",")[0] for line in logs[1]
    ]


def test_resume_after_kill_matches_uninterrupted_run(tmp_path: Path, few: list[str]) -> None:
    options = [*few, "--epochs", "5"]
    training.run(parse([*options, "--output", str(tmp_path / "whole")]))
    options += ["--output", str(tmp_path / "killed"), "--resume"]
    process = subprocess.Popen([*COMMAND, *options], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # the first epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert load(tmp_path / "killed" / "last.pth")["epoch"] < 5
    training.run(parse(options))
    assert_same(*(load(tmp_path / folder / "last.pth") for folder in ("killed", "whole")))


@pytest.mark.parametrize("attention", ["simam", pytest.param("se", marks=pytest.mark.sweep)])
def test_train_on_two_processes_matches_accumulation(
    tmp_path: Path, few: list[str], attention: str
) -> None:
    options = [*few, "--attention", attention, "--epochs", "2"]
    options += ["--device", "cpu", "--lr", "0.01"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, "-m", MODULE, *options, "--output", str(tmp_path / "two")],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1") == 1  # only the first process prints
    training.run(parse([*options, "--accumulate", "2", "--output", str(tmp_path / "one")]))
    two, one = (load(tmp_path / folder / "last.pth") for folder in ("two", "one"))
    assert two["step"] == one["step"] == 8
    state, expected = two["state_dict"], one["state_dict"]
    assert state.keys() == expected.keys()
    parameters = [k for k in state if "running" not in k and "num_batches" not in k]
    for key in parameters:
        torch.testing.assert_close(state[key], expected[key], rtol=1e-4, atol=1e-5)
    assert two["rows"][1]["train_loss"] == pytest.approx(one["rows"][1]["train_loss"], rel=1e-5)
    # Every test image counts once: the score is a whole number of the 61 images.
    hits = two["rows"][0]["top1"] * 0.61
    assert hits == pytest.approx(round(hits), abs=1e-6)
    # Another number of processes resumes the run if a batch norm sees as many images.
    options += ["--output", str(tmp_path / "two"), "--resume"]
    with pytest.raises(UserError, match="images_of_a_norm was 32, now 64"):
        training.run(parse(options))
    training.run(parse([*options, "--accumulate", "2"]))


def test_trainer_accumulates_gradient_of_whole_batch(
    monkeypatch: pytest.MonkeyPatch, few: list[str]
) -> None:
    """In a network in which no image affects another: no norm, no dropout."""

    def plain(num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, num_classes)
        )

    monkeypatch.setitem(networks.NETWORKS, "plain", plain)
    monkeypatch.setattr(training, "_train", lambda trainer, *_: trainer)
    states = []
    for accumulate in ("1", "4"):
        arguments = ["--model", "plain", "--attention", "none", "--accumulate", accumulate]
        trainer: Any = training.run(parse([*few, *arguments]))
        trainer.epoch(0, 3)
        states.append(trainer.model.state_dict())
    assert trainer.step == 3
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_trainer_step_matches_hand_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum, weight decay on every parameter, and the average of the weights."""
    monkeypatch.setattr(training, "_train", lambda trainer, *_: trainer)
    monkeypatch.setattr(Tiny, "forward", lambda net, x: net.fc(net.bn1(net.conv1(x)).mean((2, 3))))
    arguments = ["--model", "tiny", "--attention", "none", "--ema", "0.75", "--weight-decay", "0.1"]
    trainer: Any = training.run(parse([*arguments, "--lr", "0.5", "--momentum", "0.6"]))
    model = networks.build("tiny", 10)
    names = [name for name, _ in model.named_parameters()]
    buffers, averages = {}, {k: p.detach().clone() for k, p in model.named_parameters()}
    total_steps = 15 * 22
    for step, (images, labels) in zip(range(3), trainer.loader, strict=False):
        loss = nn.functional.cross_entropy(model(images), labels)
        used = [n for n in names if not n.startswith(("conv2", "bn2", "conv3"))]
        gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in used])
        lr = 0.5 * (1 + math.cos(math.pi * step / total_steps)) / 2
        with torch.no_grad():
            for name, gradient in zip(used, gradients, strict=True):
                parameter = model.get_parameter(name)
                change = gradient + 0.1 * parameter
                buffers[name] = 0.6 * buffers[name] + change if name in buffers else change
                parameter -= lr * buffers[name]
            for name, parameter in model.named_parameters():
                averages[name] = 0.75 * averages[name] + 0.25 * parameter
    trainer.epoch(0, 3)
    for name in names:
        found, average = (m.get_parameter(name) for m in (trainer.model, trainer.ema.module))
        torch.testing.assert_close(found, model.get_parameter(name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(average, averages[name], rtol=1e-4, atol=1e-5)


def test_evaluate_matches_hand_computation() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1]])
    data = [(scores[0], 0), (scores[0], 4), (scores[0], 5), (scores[1], 2), (scores[2], 6)]
    dist_context = DistributedContext(0, 1, torch.device("cpu"))

    class ImagesAsScores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x.flatten(1)

    images: Any = [(row[:, None, None], label) for row, label in data]
    found = evaluate(
        ImagesAsScores(),
        images,
        dist_context,
        batch_size=2,
        amp="none",
        channels_last=False,
        workers=0,
    )
    assert found["top1"] == pytest.approx(40)
    assert found["top5"] == pytest.approx(80)
    losses = [-row.log_softmax(0)[label].item() for row, label in data]
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_train_with_options_of_computation_learns_the_same(tmp_path: Path, run: Run) -> None:
    base = run(tmp_path / "base", "--seed", "3")
    for number, options in enumerate(
        [("--channels-last",), ("--amp", "bfloat16"), ("--workers", "2"), ("--deterministic",)]
    ):
        row = run(tmp_path / str(number), "--seed", "3", *options)
        tolerance = 1e-3 if "bfloat16" in options else 1e-5
        assert row["train_loss"] == pytest.approx(base["train_loss"], rel=tolerance), options
    torch.use_deterministic_algorithms(False)
    # The number of workers changes no bit.
    assert_same(*(load(tmp_path / f / "last.pth")["state_dict"] for f in ("base", "2")))
    other = run(tmp_path / "other", "--seed", "4")
    assert other["train_loss"] != base["train_loss"]


def test_train_compiles_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    compiled = []
    compile_ = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile",
        lambda module: (compiled.append(module), compile_(module, backend="aot_eager")),
    )  # fmt: skip
    base = run(tmp_path / "base", "--epochs", "1")
    row = run(tmp_path / "compiled", "--epochs", "1", "--compile")
    assert [type(module) for module in compiled] == [Tiny]
    assert row["train_loss"] == pytest.approx(base["train_loss"], rel=1e-5)
    found, expected = (load(tmp_path / f / "last.pth") for f in ("compiled", "base"))
    assert found["state_dict"].keys() == expected["state_dict"].keys()


def test_train_saves_first_of_equally_good_epochs_as_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    scores = iter([50.0, 70.0, 70.0, 60.0])
    monkeypatch.setattr(
        training, "_score", lambda *_: {"loss": 1.0, "top1": next(scores), "top5": 99.0}
    )
    run(tmp_path, "--epochs", "4")
    assert load(tmp_path / "best.pth")["epoch"] == 2
    assert load(tmp_path / "last.pth")["epoch"] == 4


def test_train_writes_tensorboard_events(tmp_path: Path, run: Run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    row = run(tmp_path, "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("top1")] == [0, 1]
    assert events.Scalars("top1")[-1].value == pytest.approx(row["top1"], rel=1e-6)


def test_train_starts_from_weights(tmp_path: Path, run: Run) -> None:
    run(tmp_path / "first", "--attention", "none")
    weights = str(tmp_path / "first" / "last.pth")
    options = parse(["--model", "tiny", "--weights", weights, "--attention", "simam"])
    with pytest.warns(UserWarning, match="1 only in this model: conv3.simam$"):
        model = training.build(options, 10)
    expected = load(Path(weights))["state_dict"]
    assert_same(dict(model.state_dict()), dict(expected))
    assert any(isinstance(m, simam.SimAM) for m in model.modules())


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder like ImageNet's, with one image of noise per class."""
    folder = tmp_path_factory.mktemp("imagenet")
    noise = np.random.default_rng(0).integers(0, 256, (1000, 16, 16, 3), np.uint8)
    for number, pixels in enumerate(noise):
        path = folder / "val" / f"n{number:08}"
        path.mkdir(parents=True)
        Image.fromarray(pixels).save(path / "0.png")
    (folder / "train").symlink_to("val")
    return folder


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_train_evaluates_files_of_the_authors(
    tmp_path: Path, thousand_classes: Path, name: str
) -> None:
    theirs = filled(name)
    path = publish(theirs, tmp_path / "checkpoint.pth.tar")
    arguments = ["--recipe", "paper-resnet", "--model", name, "--attention", "simam"]
    arguments += ["--dataset", "imagefolder", "--data", str(thousand_classes)]
    arguments += ["--evaluate", "--weights", str(path), "--input-size", "40"]
    found = training.run(parse(arguments))
    data = datasets.load("imagefolder", thousand_classes, RECIPES["paper-resnet"], 40)
    images = torch.stack([image for image, _ in data.test])
    with torch.no_grad():
        scores = torch.cat([theirs.eval()(batch) for batch in images.split(100)])
    loss = nn.functional.cross_entropy(scores, torch.arange(1000)).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet19"], "unknown model 'resnet19'"),
        (["--batch-size", "63", "--accumulate", "2"], "expected a multiple of 2"),
        (["--batch-size", "2000"], "expected at most 1437, the number of training images"),
        (["--e-lambda", "0"], "e_lambda"),
        (["--epochs", "0"], "expected at least 1, got 0"),
        (["--evaluate"], "expected --weights FILE"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--weights", "missing.pth", "--attention", "none"], "cannot read missing.pth"),
        (["--device", "gpu"], "expected cpu or cuda, got 'gpu'"),
        (["--dataset", "imagefolder"], "--data: expected a folder"),
        (["--lr", "1e30"], "the loss is nan at step"),
        (
            ["--model", "vit_tiny_patch16_224", "--attention", "none"],
            "vit_tiny_patch16_224 cannot take images of 8 x 8: AssertionError: Input height (8)",
        ),
        (
            ["--model", "googlenet", "--attention", "none", "--input-size", "64"],
            "without auxiliary heads",
        ),
    ],
)  # fmt: skip
def test_train_errors_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    fast = ["--model", "tiny", "--batch-size", "32"]
    monkeypatch.setattr(sys, "argv", ["train.py", *fast, *arguments])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m benchmarks.accuracy.train: error: ")
    assert message in last


def run_without(packages: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a process in which these packages cannot be imported."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(sys.argv[1].split(',')))\n"
        "del sys.argv[:2]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, ",".join(packages), *command],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip


OPTIONAL = [
    "matplotlib", "numpy", "PIL", "pycocotools", "sklearn", "tensorboard", "timm", "torchvision",
    "tqdm",
]  # fmt: skip


@pytest.mark.parametrize("script", ["train", "compare"])
def test_help_needs_no_optional_package(script: str) -> None:
    done = run_without(OPTIONAL, f"benchmarks.accuracy.{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m benchmarks.accuracy.{script} ")


@pytest.mark.parametrize("script", ["train", "compare"])
def test_missing_package_is_named_with_its_extra(tmp_path: Path, script: str) -> None:
    module = f"benchmarks.accuracy.{script}"
    done = run_without(["timm"], module, "--output", str(tmp_path / "run"))
    assert done.returncode == 2
    (message,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert message.startswith(f"python -m {module}: error: ")
    assert "timm" in message
    assert message.endswith('pip install ".[train]"')
    assert not (tmp_path / "run").exists()


def test_train_interrupted_mentions_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "epoch", interrupt)
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith(
        "python -m benchmarks.accuracy.train: interrupted; --resume continues after the last "
        "complete epoch\n"
    )


@pytest.mark.parametrize("workers", ["0", "1"])
def test_train_names_unreadable_image(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: str,
) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"no image")
    arguments = ["--dataset", "imagefolder", "--data", ".", "--batch-size", "2", "--epochs", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--workers", workers])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "python -m benchmarks.accuracy.train: error: train/bee/1.png cannot be read as an image: "
        "UnidentifiedImageError: cannot identify image file 'train/bee/1.png'\n"
    )


def test_train_keeps_existing_checkpoints(tmp_path: Path, run: Run) -> None:
    run(tmp_path, "--epochs", "1")
    before = (tmp_path / "last.pth").read_bytes()
    with pytest.raises(UserError, match=r"last\.pth exists; resume from it with --resume"):
        run(tmp_path, "--epochs", "1")
    message = r"other settings: lr was 0.1, now 0.2; seed was 0, now 1"
    with pytest.raises(UserError, match=message):
        run(tmp_path, "--epochs", "1", "--resume", "--seed", "1", "--lr", "0.2")
    assert (tmp_path / "last.pth").read_bytes() == before
    row = run(tmp_path, "--epochs", "1", "--resume")  # nothing is left to train
    assert row["epoch"] == 1
    torch.save({"state_dict": Tiny(10).state_dict()}, tmp_path / "last.pth")
    with pytest.raises(UserError, match="it has no optimizer, rows, settings"):
        run(tmp_path, "--epochs", "1", "--resume")


def test_train_refuses_weights_of_another_model(tmp_path: Path, run: Run) -> None:
    run(tmp_path, "--epochs", "1")
    weights = str(tmp_path / "last.pth")
    for attention in ("none", "simam"):
        arguments = ["--model", "cifar_resnet20", "--attention", attention, "--weights", weights]
        with pytest.raises(UserError, match=r"last\.pth.*missing"):
            training.build(parse(arguments), 10)
