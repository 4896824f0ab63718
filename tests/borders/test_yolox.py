"""YOLOX folds every norm whose parent is exactly its BaseConv."""

import copy
from collections.abc import Callable

import torch

from simam import attach, attached, detach
from tests.helpers.borders import compare, needs, tool, train_norms

pytestmark = needs("yolox", "loguru", "cv2")


@torch.no_grad()
def test_fuse_model_gives_the_unfused_values(record: Callable[..., None]) -> None:
    from yolox.exp import get_exp
    from yolox.utils import fuse_model

    torch.manual_seed(0)
    net = get_exp(None, "yolox-nano").get_model().backbone
    train_norms(net, torch.rand(4, 3, 128, 128))
    attach(net, e_lambda=0.1)
    hosts = attached(net).keys()
    x = torch.rand(1, 3, 64, 64)
    plain, expected = (n(x)[0] for n in (detach(copy.deepcopy(net)), net))
    before = len(net.state_dict())
    for _ in range(2):
        fuse_model(net)
        differences = compare(net(x)[0], expected, plain)
    assert len(net.state_dict()) < before
    assert attached(net).keys() == hosts
    record(tool("yolox"), "`fuse_model`, twice", "works", network="yolox-nano", **differences)
