"""Ultralytics folds norms in predict, val, export and at the end of training, without being asked.

Differences are those of the features that the head gets, or of the scores that it computes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simam import attach, attached, detach
from tests.helpers.borders import (
    NOTICEABLE,
    TOLERANCE,
    compare,
    needs,
    relative_difference,
    tool,
    train_norms,
)

pytestmark = needs("ultralytics", "cv2")

HOSTS = {"yolov8n": 10, "yolo11n": 11, "yolov5n": 11, "yolo12n": 10, "yolov9t": 42, "yolov10n": 10}

Record = Callable[..., None]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = tmp_path_factory.mktemp("settings")
    for file in ("Arial.ttf", "Ultralytics/Arial.ttf"):
        (settings / file).parent.mkdir(exist_ok=True)
        (settings / file).touch()  # a font that exists is not downloaded
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(settings))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        patch.setenv("MPLBACKEND", "agg")
        yield


@pytest.fixture
def data(folder: Path) -> str:
    """Four images with a rectangle each, as a data set of Ultralytics."""
    from PIL import Image, ImageDraw

    for split in ("train", "val"):
        images, labels = (folder / kind / split for kind in ("images", "labels"))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (64, 64), (60, 60, 60))
            ImageDraw.Draw(image).rectangle((10 + i, 12, 40, 44), (200, 80, 30))
            image.save(images / f"{i}.png")
            (labels / f"{i}.txt").write_text("0 0.4 0.44 0.45 0.5\n")
    (folder / "data.yaml").write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [rectangle]\n"
    )
    return "data.yaml"


@cache
def network(name: str) -> nn.Module:
    from ultralytics import YOLO

    torch.manual_seed(0)
    net = train_norms(YOLO(f"{name}.yaml").model, torch.rand(4, 3, 128, 128))
    for module in net.model[-1].modules():
        # Scores near 0 would not depend on the features.
        is_last = isinstance(module, nn.Conv2d) and module.bias is not None
        if is_last and module.out_channels == net.model[-1].nc:
            nn.init.normal_(module.weight, std=2 / module.in_channels**0.5)
            nn.init.zeros_(module.bias)
    return attach(net.requires_grad_(False), e_lambda=0.1)


@pytest.fixture(params=HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(name: str) -> nn.Module:
    """The attached network, which is never folded."""
    assert len(attached(network(name))) == HOSTS[name]
    return copy.deepcopy(network(name))


@pytest.fixture
def yolo(name: str) -> Any:
    from ultralytics import YOLO

    yolo = YOLO(f"{name}.yaml")
    yolo.model = copy.deepcopy(network(name))
    return yolo


@contextmanager
def seen_by_head(net: nn.Module) -> Iterator[list[tuple[Tensor, list[Tensor]]]]:
    """Collect the images that a network gets, and the features that its head gets.

    Ultralytics copies networks; the hooks of a copy fill the same list.
    """
    images: list[Tensor] = []
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def keep_image(module: nn.Module, args: Any) -> None:
        images.append(args[0].detach().clone())

    def keep_features(module: nn.Module, args: Any) -> None:
        seen.append((images[-1], [feature.detach().clone() for feature in args[0]]))

    hooks = [
        net.model[0].register_forward_pre_hook(keep_image),
        net.model[-1].register_forward_pre_hook(keep_features),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def features(net: nn.Module, x: Tensor) -> list[Tensor]:
    with seen_by_head(net) as seen:
        net(x)
    return seen[0][1]


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(map(relative_difference, actual, expected))


def compare_all(seen: list[tuple[Tensor, list[Tensor]]], reference: nn.Module) -> dict[str, float]:
    """Compare all features with the right ones, and those with the features without SimAM."""
    plain = detach(copy.deepcopy(reference))
    # Ultralytics warms up with uninitialised memory.
    seen = [(x, y) for x, y in seen if ((x >= 0) & (x <= 1)).all()]
    assert seen
    expected = [features(reference, x) for x, _ in seen]
    difference = max(largest_difference(y, z) for (_, y), z in zip(seen, expected, strict=True))
    without = max(
        largest_difference(features(plain, x), z) for (x, _), z in zip(seen, expected, strict=True)
    )
    assert difference < TOLERANCE
    assert without > NOTICEABLE
    return {"difference": difference, "without": without}


def scores(output: Any, nc: int) -> Tensor:
    """The scores of all classes; of the best ones, sorted, where the network selects them."""
    output = torch.as_tensor(output[0] if isinstance(output, list | tuple) else output)
    return output[..., 4] if output.shape[-1] == 6 else output[:, 4 : 4 + nc]


def save(record: Record, case: str, name: str, differences: dict[str, float]) -> None:
    record(tool("ultralytics"), case, "works", network=name, **differences)


def test_fuse_gives_the_unfused_values(
    name: str, yolo: Any, reference: nn.Module, record: Record
) -> None:
    x = torch.rand(1, 3, 64, 64)
    before = len(yolo.model.state_dict())
    yolo.fuse()
    fused_keys = yolo.model.state_dict().keys()
    assert len(fused_keys) < before
    yolo.fuse()
    assert yolo.model.state_dict().keys() == fused_keys
    assert len(attached(yolo.model)) == HOSTS[name]
    with seen_by_head(yolo.model) as seen:
        yolo.model(x)
    save(record, "`model.fuse()`, twice", name, compare_all(seen, reference))


@pytest.mark.parametrize("place", ["norm", "branch"])
def test_fuse_gives_the_unfused_values_at_every_place(
    name: str, yolo: Any, place: str, record: Record
) -> None:
    net = attach(detach(yolo.model), place=place, e_lambda=0.1)
    hosts = attached(net).keys()
    reference = copy.deepcopy(net)
    for _ in range(2):
        yolo.fuse()
        assert attached(net).keys() == hosts
        with seen_by_head(net) as seen:
            net(torch.rand(1, 3, 64, 64))
        differences = compare_all(seen, reference)
    save(record, f'`model.fuse()`, twice, with `place="{place}"`', name, differences)


def test_fuse_of_the_plain_network_gives_the_unfused_values(yolo: Any) -> None:
    x = torch.rand(1, 3, 64, 64)
    expected = features(detach(yolo.model), x)
    yolo.fuse()
    assert largest_difference(features(yolo.model, x), expected) < TOLERANCE


def test_predict_then_val_give_the_unfused_values(
    name: str, yolo: Any, reference: nn.Module, data: str, record: Record
) -> None:
    for _ in range(2):
        yolo.predictor = None  # which folds the network
        with seen_by_head(yolo.model) as seen:
            result = yolo.predict(
                "images/val/0.png", imgsz=64, conf=0.01, device="cpu", verbose=False
            )
        assert len(result[0].boxes)
        predicted = compare_all(seen, reference)
        with seen_by_head(yolo.model) as seen:
            yolo.val(data=data, imgsz=64, batch=2, workers=0, device="cpu", plots=False)
        validated = compare_all(seen, reference)
    assert len(attached(yolo.model)) == HOSTS[name]
    save(record, "`predict`", name, predicted)
    save(record, "`val`", name, validated)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_export_gives_the_unfused_values(
    name: str, yolo: Any, reference: nn.Module, form: str, record: Record
) -> None:
    x = torch.rand(1, 3, 64, 64)
    file = yolo.export(format=form, imgsz=64, device="cpu")
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        output = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    else:
        output = torch.jit.load(file)(x)
    head = reference.model[-1]
    head.export = True  # the same layout of the output
    head.format = form
    plain = detach(copy.deepcopy(reference))
    outputs = [scores(y, head.nc) for y in (output, reference(x), plain(x))]
    differences = compare(*outputs)
    assert len(attached(yolo.model)) == HOSTS[name]
    title = {"onnx": "ONNX", "torchscript": "TorchScript"}[form]
    save(record, f"export to {title}", name, differences)


def train(yolo: Any, data: str, **options: Any) -> None:
    yolo.train(
        data=data,
        imgsz=64,
        epochs=1,
        batch=2,
        workers=0,
        device="cpu",
        plots=False,
        project="runs",
        **options,
    )


@pytest.mark.parametrize("name", ["yolov8n"])
def test_train_without_the_recipe_loses_simam(yolo: Any, data: str) -> None:
    """If this test fails, the recipe in docs/compatibility.md may have become unnecessary."""
    train(yolo, data)
    assert attached(yolo.model) == {}


def simam_trainer() -> type:
    from ultralytics.models.yolo.detect import DetectionTrainer

    class SimAMTrainer(DetectionTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            return attach(super().get_model(*args, **kwargs), e_lambda=0.1)

    return SimAMTrainer


def test_train_with_the_recipe_keeps_simam(name: str, data: str, record: Record) -> None:
    from ultralytics import YOLO

    yolo = YOLO(f"{name}.yaml")
    train(yolo, data, trainer=simam_trainer())
    best = YOLO(yolo.trainer.best).model.float()
    for net in (yolo.trainer.model, yolo.trainer.ema.ema, yolo.model, best):
        assert len(attached(net)) == HOSTS[name]

    # At the end, `train` has folded the best network and evaluated it.
    train_norms(best, torch.rand(4, 3, 128, 128))
    x = torch.rand(1, 3, 64, 64)
    folded = copy.deepcopy(best).fuse()
    with torch.no_grad(), seen_by_head(folded) as seen:
        folded(x)
        differences = compare_all(seen, best)
    save(record, "`train` with `SimAMTrainer`", name, differences)


def test_train_from_a_saved_network_needs_the_recipe_again(data: str) -> None:
    from ultralytics import YOLO

    yolo = YOLO("yolov8n.yaml")
    train(yolo, data, trainer=simam_trainer())
    saved = yolo.trainer.best
    for options, expected in (({}, 0), ({"trainer": simam_trainer()}, HOSTS["yolov8n"])):
        again = YOLO(saved)
        assert len(attached(again.model)) == HOSTS["yolov8n"]
        train(again, data, **options)
        assert len(attached(again.model)) == expected
