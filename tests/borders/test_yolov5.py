"""The package yolov5 folds norms as Ultralytics does."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from simam import attach, attached, detach
from tests.helpers.borders import compare, needs, tool, train_norms

pytestmark = needs("yolov5", "cv2")


@torch.no_grad()
def test_fuse_gives_the_unfused_values(
    monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    from yolov5.models.yolo import Model

    torch.manual_seed(0)
    file = Path(find_spec("yolov5").origin).with_name("models") / "yolov5n.yaml"
    net = attach(train_norms(Model(str(file)), torch.rand(4, 3, 128, 128)), e_lambda=0.1)
    x = torch.rand(1, 3, 64, 64)
    # The maps before they become boxes.
    plain, expected = (n(x)[1][0] for n in (detach(copy.deepcopy(net)), net))
    for _ in range(2):
        net.fuse()
        differences = compare(net(x)[1][0], expected, plain)
    assert len(attached(net)) == 11
    record(tool("yolov5"), "`model.fuse()`, twice", "works", network="yolov5n", **differences)
