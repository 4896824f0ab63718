"""The ways of docs/yolo.md to SimAM in Ultralytics: a row of the YAML, and attach at the end.

Each is trained, validated, run, and exported to ONNX. `.ci/borders` runs these tests.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import simam
from tests.helpers.borders import compare, needs, tool, train_norms

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
    from ultralytics.nn import tasks

    tasks.SimAM = simam.SimAM
    yield
    del tasks.SimAM


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


def test_row_of_the_yaml(data: str, registered: None, record: Callable[..., None]) -> None:
    import yaml
    from ultralytics import YOLO

    config = with_simam_row(copy.deepcopy(YOLO("yolov8n.yaml").model.yaml))
    assert config["backbone"][-1] == ROW
    Path("yolov8n-simam.yaml").write_text(yaml.safe_dump(config))
    yolo = YOLO("yolov8n-simam.yaml")
    assert len(layers(yolo.model)) == 1
    run_everything(yolo, data, 1, record, "SimAM as a row of the YAML")


def test_attach_at_the_end_of_the_branch(data: str, record: Callable[..., None]) -> None:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    class SimAMTrainer(DetectionTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            model = super().get_model(*args, **kwargs)
            return simam.attach(model, place="branch", e_lambda=1e-4)

    yolo = YOLO("yolov8n.yaml")
    case = '`attach(place="branch")`'
    run_everything(yolo, data, 10, record, case, trainer=SimAMTrainer)
    assert all(path.endswith("cv2") for path in simam.attached(yolo.model))
