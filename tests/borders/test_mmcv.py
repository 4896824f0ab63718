"""mmcv folds a norm into the convolution that was registered before it."""

import copy
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from simam import attach, attached, detach
from tests.helpers.borders import compare, needs, tool, train_norms

pytestmark = needs("mmcv", "mmengine", "torchvision")


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_fuse_conv_bn_is_refused(bias: bool, record: Callable[..., None]) -> None:
    import torchvision
    from mmcv.cnn import fuse_conv_bn

    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    if bias:
        for block in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
            block.bias = nn.Parameter(torch.randn(block.out_channels))
    train_norms(net, torch.rand(4, 3, 64, 64))
    attach(net, e_lambda=0.1)
    x = torch.rand(1, 3, 64, 64)
    plain, expected = detach(copy.deepcopy(net)), net(x)
    with pytest.raises(RuntimeError, match=r"^cannot fold .* This module has not been changed\."):
        fuse_conv_bn(net)
    assert len(attached(net)) == 8
    differences = compare(net(x), expected, plain(x))
    expected = plain(x)
    torch.testing.assert_close(fuse_conv_bn(plain)(x), expected, rtol=1e-4, atol=1e-4)
    name = "mmcv" if find_spec("mmcv._ext") else "mmcv-lite"
    network = "resnet18 with biases" if bias else "resnet18"
    record(tool(name), "`fuse_conv_bn`", "refused clearly", network=network, **differences)
