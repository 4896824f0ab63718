"""The ways of docs/yolo.md to SimAM in Ultralytics: attach, a row of the YAML, and convert.

Each is trained, validated, run, and exported to ONNX. `.ci/borders` runs these tests.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from tests.helpers.borders import compare, needs, tool, train_norms
from tests.helpers.docs import python_blocks

pytestmark = needs("ultralytics", "cv2")

ROW = [-1, 1, "SimAM", [None, 0.0001]]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty working directory with four drawn images; nothing is downloaded."""
    from PIL import Image, ImageDraw

    monkeypatch.chdir(tmp_path)
    for name in ("Arial.ttf", "Ultralytics/Arial.ttf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (64, 64), (60, 60, 60))
            ImageDraw.Draw(image).rectangle((10 + i, 12, 40, 44), (200, 80, 30))
            image.save(tmp_path / "images" / split / f"{i}.png")
            (tmp_path / "labels" / split / f"{i}.txt").write_text("0 0.4 0.44 0.45 0.5\n")
    text = f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [rectangle]\n"
    (tmp_path / "data.yaml").write_text(text)
    return "data.yaml"


@pytest.fixture
def registered() -> Iterator[None]:
    tasks = definitions("As a row of the YAML")["tasks"]
    assert tasks.SimAM is simam.SimAM
    yield
    del tasks.SimAM


@pytest.fixture
def fork() -> Iterator[None]:
    """Ultralytics with a hand-written copy."""
    from ultralytics.nn import tasks

    tasks.SimAM = SimAM
    yield
    del tasks.SimAM


@pytest.fixture
def network_with_row() -> str:
    """The file of a network with a row SimAM."""
    import yaml
    from ultralytics import YOLO

    config = with_simam_row(copy.deepcopy(YOLO("yolov8n.yaml").model.yaml))
    assert config["backbone"][-1] == ROW
    Path("yolov8n-simam.yaml").write_text(yaml.safe_dump(config))
    return "yolov8n-simam.yaml"


class SimAM(nn.Module):
    """A hand-written copy, as forks have it."""

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        squares = (x - x.mean((2, 3), keepdim=True)).pow(2)
        variance = squares.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(squares / (4 * (variance + self.e_lambda)) + 0.5)


def definitions(heading: str) -> dict[str, Any]:
    """What the first block under a heading of the page defines, before it uses it."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    exec(python_blocks("yolo.md")[heading][0].partition("\nyolo = ")[0], namespace)
    return namespace


def with_simam_row(config: dict[str, Any]) -> dict[str, Any]:
    """The network with SimAM behind the last layer of the backbone."""
    place = len(config["backbone"])
    config["backbone"].append(copy.deepcopy(ROW))
    for row in config["head"]:
        sources = row[0] if isinstance(row[0], list) else [row[0]]
        moved = [source + 1 if source >= place - 1 else source for source in sources]
        row[0] = moved if isinstance(row[0], list) else moved[0]
    return config


def layers(net: nn.Module) -> list[simam.SimAM]:
    return [module for module in net.modules() if isinstance(module, simam.SimAM)]


def run_everything(
    yolo: Any, data: str, count: int, record: Callable[..., None], case: str, **options: Any
) -> None:
    """Train, validate, predict and export; SimAM is there each time and in the exported graph."""
    import onnxruntime

    common = {"imgsz": 64, "device": "cpu", "workers": 0, "plots": False, "batch": 2}
    yolo.train(data=data, epochs=1, project="runs", **common, **options)
    assert len(layers(yolo.model)) == count
    assert {layer.e_lambda for layer in layers(yolo.model)} == {1e-4}
    train_norms(yolo.model.float(), torch.rand(4, 3, 128, 128))
    head = yolo.model.model[-1]
    for branch in head.cv3:  # scores near 0 would not depend on the features
        nn.init.normal_(branch[-1].weight, std=2 / branch[-1].in_channels ** 0.5)
        nn.init.zeros_(branch[-1].bias)
    reference = copy.deepcopy(yolo.model).eval()
    yolo.val(data=data, **common)
    yolo.predict("images/val/0.png", imgsz=64, device="cpu", verbose=False)
    assert len(layers(yolo.model)) == count
    file = yolo.export(format="onnx", imgsz=64, device="cpu")
    session = onnxruntime.InferenceSession(file)
    x = torch.rand(1, 3, 64, 64)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    plain = copy.deepcopy(reference)
    for module in plain.modules():
        if isinstance(module, simam.SimAM):
            module.forward = lambda x, mask=None: x
    for net in (reference, plain):
        net.model[-1].export, net.model[-1].format = True, "onnx"
    with torch.no_grad():
        outputs = torch.as_tensor(output), reference(x), plain(x)
    # The scores; boxes are in pixels, and would dwarf them.
    differences = compare(*(y[:, 4:] for y in outputs))
    record(tool("ultralytics"), case, "works", network="yolov8n", **differences)


def test_row_of_the_yaml(
    data: str, registered: None, network_with_row: str, record: Callable[..., None]
) -> None:
    from ultralytics import YOLO

    yolo = YOLO(network_with_row)
    assert len(layers(yolo.model)) == 1
    run_everything(yolo, data, 1, record, "SimAM as a row of the YAML")


def copies(net: nn.Module) -> list[SimAM]:
    return [module for module in net.modules() if isinstance(module, SimAM)]


def test_convert_in_a_trainer(
    data: str, fork: None, network_with_row: str, record: Callable[..., None]
) -> None:
    from ultralytics import YOLO

    trainer = definitions("In a fork that has a copy")["ConvertingTrainer"]
    yolo = YOLO(network_with_row)
    assert (len(copies(yolo.model)), len(layers(yolo.model))) == (1, 0)
    run_everything(yolo, data, 1, record, "`convert` in a trainer", trainer=trainer)
    for net in (yolo.model, YOLO(yolo.trainer.best).model):
        assert (len(copies(net)), len(layers(net))) == (0, 1)


def test_convert_of_a_network_trained_with_copies(
    data: str, fork: None, network_with_row: str, record: Callable[..., None]
) -> None:
    from ultralytics import YOLO

    yolo = YOLO(network_with_row)
    options = {"imgsz": 64, "device": "cpu", "workers": 0, "plots": False, "batch": 2}
    yolo.train(data=data, epochs=1, project="runs", **options)
    net = train_norms(yolo.model.float(), torch.rand(4, 3, 128, 128))
    assert (len(copies(net)), len(layers(net))) == (1, 0)
    plain = copy.deepcopy(net)
    copies(plain)[0].forward = lambda x: x
    seen: list[Tensor] = []
    for each in (net, plain):
        each.model[-1].register_forward_pre_hook(lambda _, maps: seen.extend(maps[0][-1:]))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        net(x)
        plain(x)
        assert simam.convert(net) is net
        net(x)
    assert (len(copies(net)), len(layers(net))) == (0, 1)
    expected, without, actual = seen
    case = "`convert` of a network trained with copies"
    differences = compare(actual, expected, without)
    record(tool("ultralytics"), case, "works", network="yolov8n", **differences)


def test_attach_at_the_end_of_the_branch(data: str, record: Callable[..., None]) -> None:
    from ultralytics import YOLO

    trainer = definitions("At the end of every residual branch")["SimAMTrainer"]
    yolo = YOLO("yolov8n.yaml")
    case = '`attach(place="branch")`'
    run_everything(yolo, data, 10, record, case, trainer=trainer)
    assert all(path.endswith("cv2") for path in simam.attached(yolo.model))
