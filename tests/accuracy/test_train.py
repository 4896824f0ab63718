"""benchmarks/train.py, run as users run it, or close to that."""

import csv
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from simam.messages import UserError
from tests.helpers.authors_networks import filled, publish

pytest.importorskip("timm", reason="the scripts need timm")
Image = importlib.import_module("PIL.Image")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
train = importlib.import_module("benchmarks.accuracy.train")
distributed = importlib.import_module("benchmarks.accuracy.common.distributed")
recipes = importlib.import_module("benchmarks.accuracy.classification.recipes")
engine = importlib.import_module("benchmarks.accuracy.classification.trainer")
networks = importlib.import_module("benchmarks.accuracy.classification.networks")
files = importlib.import_module("benchmarks.accuracy.common.checkpoint")

ROOT = Path(__file__).parents[2]
# The simam that is tested here, and sums in the order in which they are taken here.
SIMAM = str(Path(simam.__file__).parents[1])
ENVIRONMENT = os.environ | {"PYTHONPATH": SIMAM, "OMP_NUM_THREADS": "1"}
SCRIPT = ["-m", "benchmarks.accuracy.train"]


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
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", Tiny)


def run(output: Path, *arguments: str) -> dict[str, Any]:
    given = ["--model", "tiny", "--epochs", "2", *arguments, "--output", str(output)]
    return train.run(train.parse(given))


def script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Bit by bit, but for how long it took."""
    assert type(found) is type(expected), place
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), place
        for key in found.keys() - {"seconds"}:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}.{i}")
    elif isinstance(found, Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


def test_without_arguments_digits_are_learnt(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = script(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # a bar is for terminals
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
    # What the log says of the last epoch is what the weights do.
    weights = str(folder / "last.pth")
    done = script("--evaluate", "--weights", weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = rows[-1]
    assert done.stdout == (
        f"top-1 {float(row['top1']):.2f} %, top-5 {float(row['top5']):.2f} %, "
        f"loss {float(row['loss']):.4f}\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--attention", "simam", "--ema", "0.9", "--recipe", "paper-cifar"),
        ("--attention", "cbam", "--accumulate", "2", "--amp", "bfloat16", "--channels-last"),
    ],
)
def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    options = (*options, "--epochs", "4")
    if options[1] == "cbam":
        options = (*options, "--model", "cifar_resnet20", "--epochs", "3")
    run(tmp_path / "whole", *options)
    whole_epoch, calls = engine.Trainer.epoch, 0

    def break_off(trainer: Any, number: int, steps: int) -> dict[str, float]:
        nonlocal calls
        calls += 1
        found = whole_epoch(trainer, number, steps)
        if calls == 3:  # trained, but not yet saved
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(engine.Trainer, "epoch", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", *options)
    assert files.load(tmp_path / "broken" / "last.pth")["epoch"] == 2
    run(tmp_path / "broken", *options, "--resume")
    for name in ("last.pth", "best.pth"):
        found, expected = (files.load(tmp_path / f / name) for f in ("broken", "whole"))
        assert_same(found, expected)
    logs = [(tmp_path / f / "log.csv").read_text().splitlines() for f in ("broken", "whole")]
    assert [line.rpartition(",")[0] for line in logs[0]] == [
        line.rpartition(",")[0] for line in logs[1]
    ]


def test_killed_and_resumed_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, *SCRIPT, "--epochs", "3", "--model", "cifar_resnet20"]
    subprocess.run([*command, "--output", "whole"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    command += ["--output", "killed", "--resume"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # the first epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert files.load(tmp_path / "killed" / "last.pth")["epoch"] < 3
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    found, expected = (files.load(tmp_path / f / "last.pth") for f in ("killed", "whole"))
    assert_same(found, expected)


@pytest.mark.parametrize("attention", ["simam", "se"])
def test_two_processes_train_as_one_that_takes_two_turns(tmp_path: Path, attention: str) -> None:
    options = ["--model", "cifar_resnet20", "--attention", attention, "--epochs", "1"]
    options += ["--device", "cpu", "--lr", "0.01"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, *SCRIPT, *options, "--output", "two"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1") == 1  # the first alone prints
    done = script(*options, "--accumulate", "2", "--output", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two, one = (files.load(tmp_path / f / "last.pth") for f in ("two", "one"))
    assert two["step"] == one["step"] == 22
    state, expected = two["state_dict"], one["state_dict"]
    assert state.keys() == expected.keys()
    parameters = [k for k in state if "running" not in k and "num_batches" not in k]
    for key in parameters:  # sums in another order, over 22 steps
        torch.testing.assert_close(state[key], expected[key], rtol=1e-2, atol=1e-3)
    assert two["rows"][0]["train_loss"] == pytest.approx(one["rows"][0]["train_loss"], rel=1e-3)
    # Every test image was counted once: whole images out of 360.
    hits = two["rows"][0]["top1"] * 3.6
    assert hits == pytest.approx(round(hits), abs=1e-6)
    # Going on with another number of processes is the same run while a norm sees as many images.
    options[options.index("--epochs") + 1] = "1"
    done = script(*options, "--output", "two", "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "images_of_a_norm was 32, now 64" in done.stderr
    done = script(*options, "--output", "two", "--resume", "--accumulate", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_turns_add_up_to_the_gradient_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing that looks at other images: no norm, no dropout."""

    def plain(num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, num_classes)
        )

    monkeypatch.setitem(networks.NETWORKS, "plain", plain)
    monkeypatch.setattr(train, "_train", lambda trainer, *_: trainer)
    states = []
    for accumulate in ("1", "4"):
        arguments = ["--model", "plain", "--attention", "none", "--accumulate", accumulate]
        trainer = train.run(train.parse(arguments))
        trainer.epoch(0, 3)
        states.append(trainer.model.state_dict())
    assert trainer.step == 3
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


def test_a_step_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum, weight decay on every parameter, and the average of the weights."""
    monkeypatch.setattr(train, "_train", lambda trainer, *_: trainer)
    monkeypatch.setattr(Tiny, "forward", lambda net, x: net.fc(net.bn1(net.conv1(x)).mean((2, 3))))
    arguments = ["--model", "tiny", "--attention", "none", "--ema", "0.75", "--weight-decay", "0.1"]
    trainer = train.run(train.parse([*arguments, "--lr", "0.5", "--momentum", "0.6"]))
    model = networks.build("tiny", 10)
    names = [name for name, _ in model.named_parameters()]
    buffers, averages = {}, {k: p.detach().clone() for k, p in model.named_parameters()}
    total = 15 * 22
    for step, (images, labels) in zip(range(3), trainer.loader, strict=False):
        loss = nn.functional.cross_entropy(model(images), labels)
        used = [n for n in names if not n.startswith(("conv2", "bn2", "conv3"))]
        gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in used])
        lr = 0.5 * (1 + math.cos(math.pi * step / total)) / 2
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


def test_accuracy_by_hand() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 1]])
    data = [(scores[0], 0), (scores[0], 4), (scores[0], 5), (scores[1], 2), (scores[2], 6)]
    dist_context = distributed.DistributedContext(0, 1, torch.device("cpu"))
    model = nn.Flatten()

    class Images(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return model(x)

    images = [(row[:, None, None], label) for row, label in data]
    found = engine.evaluate(
        Images(), images, dist_context, batch=2, amp="none", channels_last=False, workers=0
    )
    assert found["top1"] == pytest.approx(40)
    assert found["top5"] == pytest.approx(80)
    losses = [-row.log_softmax(0)[label].item() for row, label in data]
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_options_that_change_how_it_is_computed(tmp_path: Path) -> None:
    base = run(tmp_path / "base", "--seed", "3")
    for number, options in enumerate(
        [("--channels-last",), ("--amp", "bfloat16"), ("--workers", "2"), ("--deterministic",)]
    ):
        row = run(tmp_path / str(number), "--seed", "3", *options)
        assert row["train_loss"] == pytest.approx(base["train_loss"], rel=0.02), options
    torch.use_deterministic_algorithms(False)
    assert_same(*(files.load(tmp_path / f / "last.pth")["state_dict"] for f in ("base", "2")))
    other = run(tmp_path / "other", "--seed", "4")
    assert other["train_loss"] != base["train_loss"]


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_ = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile",
        lambda module: (compiled.append(module), compile_(module, backend="aot_eager")),
    )  # fmt: skip
    base = run(tmp_path / "base", "--epochs", "1")
    row = run(tmp_path / "compiled", "--epochs", "1", "--compile")
    assert [type(module) for module in compiled] == [Tiny]
    assert row["train_loss"] == pytest.approx(base["train_loss"], rel=1e-3)
    found, expected = (files.load(tmp_path / f / "last.pth") for f in ("compiled", "base"))
    assert found["state_dict"].keys() == expected["state_dict"].keys()


def test_best_is_the_first_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 70.0, 70.0, 60.0])
    monkeypatch.setattr(
        train, "_score", lambda *_: {"loss": 1.0, "top1": next(scores), "top5": 99.0}
    )
    run(tmp_path, "--epochs", "4")
    assert files.load(tmp_path / "best.pth")["epoch"] == 2
    assert files.load(tmp_path / "last.pth")["epoch"] == 4


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    row = run(tmp_path, "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("top1")] == [0, 1]
    assert events.Scalars("top1")[-1].value == pytest.approx(row["top1"], rel=1e-6)


def test_weights_to_start_from(tmp_path: Path) -> None:
    run(tmp_path / "first", "--attention", "none")
    weights = str(tmp_path / "first" / "last.pth")
    options = train.parse(["--model", "tiny", "--weights", weights, "--attention", "simam"])
    model = train.build(options, 10)
    expected = files.load(Path(weights))["state_dict"]
    assert_same(dict(model.state_dict()), dict(expected))
    assert any(isinstance(m, simam.SimAM) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_authors_files_are_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    theirs = filled(name)
    path = publish(theirs, tmp_path / "checkpoint.pth.tar")
    for part in ("train", "val"):
        for number in range(1000):
            folder = tmp_path / "imagenet" / part / f"n{number:08}"
            folder.mkdir(parents=True)
            color = (number % 10 * 25, number // 10 % 10 * 25, number // 100 * 25)
            Image.new("RGB", (16, 16), color).save(folder / "0.png")
    arguments = ["--recipe", "paper-resnet", "--model", name, "--attention", "simam"]
    arguments += ["--dataset", "imagefolder", "--data", str(tmp_path / "imagenet")]
    arguments += ["--evaluate", "--weights", str(path), "--input-size", "64"]
    options = train.parse(arguments)
    found = train.run(options)
    recipe = recipes.RECIPES["paper-resnet"]
    data = train.datasets.load("imagefolder", options.data, recipe, 64)
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
        (["--batch-size", "2000"], "expected at most the 1437 images"),
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
def test_errors_are_one_line(
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
    assert last.startswith("train.py: error: ")
    assert message in last


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    code = "import sys, runpy; sys.modules['timm'] = None; runpy.run_path(sys.argv[1])"
    environment = ENVIRONMENT | {"PYTHONPATH": f"{SIMAM}{os.pathsep}{Path(SCRIPT).parent}"}
    command = [sys.executable, "-c", code, SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: ")
    assert "timm" in done.stderr
    assert done.stderr.endswith('pip install "simam[train]"\n')


def test_a_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Trainer, "epoch", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 130
    expected = "train.py: stopped; --resume goes on after the last whole epoch\n"
    assert capsys.readouterr().err.endswith(expected)


def test_an_unreadable_image_is_named_from_a_worker_too(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"no image")
    arguments = ["--dataset", "imagefolder", "--data", ".", "--batch-size", "2", "--epochs", "1"]
    for workers in ("0", "1"):
        done = script(*arguments, "--workers", workers, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == (
            "train.py: error: train/bee/1.png cannot be read as an image: UnidentifiedImageError: "
            "cannot identify image file 'train/bee/1.png'\n"
        )


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    run(tmp_path, "--epochs", "1")
    before = (tmp_path / "last.pth").read_bytes()
    with pytest.raises(UserError, match=r"last\.pth exists; go on from it with --resume"):
        run(tmp_path, "--epochs", "1")
    message = r"other settings: lr was 0.1, now 0.2; seed was 0, now 1"
    with pytest.raises(UserError, match=message):
        run(tmp_path, "--epochs", "1", "--resume", "--seed", "1", "--lr", "0.2")
    assert (tmp_path / "last.pth").read_bytes() == before
    row = run(tmp_path, "--epochs", "1", "--resume")  # there is nothing left to do
    assert row["epoch"] == 1
    torch.save({"state_dict": Tiny(10).state_dict()}, tmp_path / "last.pth")
    with pytest.raises(UserError, match="it has no optimizer, rows, settings"):
        run(tmp_path, "--epochs", "1", "--resume")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    run(tmp_path, "--epochs", "1")
    weights = str(tmp_path / "last.pth")
    for attention in ("none", "simam"):
        arguments = ["--model", "cifar_resnet20", "--attention", attention, "--weights", weights]
        with pytest.raises(UserError, match=r"last\.pth.*missing"):
            train.build(train.parse(arguments), 10)
