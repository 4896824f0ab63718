"""attach to hosts of any class: behind norms, activations, pooling and modules of others."""

import copy
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from simam import SimAM, attach, attached, detach
from simam.functional import simam
from tests.helpers.tiny_blocks import block, conv, snapshot


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = conv(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


class ConvBN(nn.Module):
    """The block of Ultralytics and its family, which can be folded."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(bias=False), nn.BatchNorm2d(8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@block
def yolo(self, x):
    return x + self.conv2(self.conv1(x))


def fold_every_conv_bn(net: nn.Module) -> nn.Module:
    """What Ultralytics does in predict, val and export."""
    for module in net.modules():
        if isinstance(module, ConvBN) and hasattr(module, "bn"):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            delattr(module, "bn")
            module.forward = module.forward_fuse
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def randomised(net: nn.Module) -> nn.Module:
    """Evaluation mode, with norms that do something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(8) + 0.5)
    return net.eval()


@pytest.fixture
def net() -> nn.Module:
    return randomised(nn.Sequential(Normed()))


@pytest.fixture
def yolo_net() -> nn.Module:
    act = nn.SiLU()  # one for all blocks
    return randomised(nn.Sequential(*(yolo(conv1=ConvBN(act), conv2=ConvBN(act)) for _ in "ab")))


@pytest.mark.parametrize("place", ["norm", "branch"])
def test_attach_behind_a_norm_matches_simam_by_hand(net: nn.Module, x: Tensor, place: str) -> None:
    inner = net[0]
    branch = inner.norm2(inner.conv2(inner.norm1(inner.conv1(x)).relu()))
    expected = x + simam(branch, 0.1)
    weights, before = copy.deepcopy(net.state_dict()), snapshot(net)
    assert attach(net, e_lambda=0.1, place=place) is net
    assert attached(net).keys() == {"0.norm2"}
    assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == list(weights)
    assert net.load_state_dict(weights, strict=True) == ([], [])
    assert isinstance(inner.norm2, nn.BatchNorm2d)
    before = [(path, kind) for path, kind, _ in before]
    assert [(path, kind) for path, kind, _ in snapshot(detach(net))] == before


def through_a_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def traced(net: nn.Module) -> nn.Module:
    return torch.jit.trace(net, torch.randn(1, 8, 5, 5))


def exported(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.export.export(net, (torch.randn(2, 8, 6, 6),)).module()


def compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        through_a_file,
        traced,
        torch.jit.script,
        exported,
        compiled,
    ],
)
@pytest.mark.parametrize("place", ["conv", "norm"])
def test_hosts_survive(net: nn.Module, x: Tensor, change: Callable, place: str) -> None:
    with torch.no_grad():
        expected = attach(net, e_lambda=0.1, place=place)(x)
        torch.testing.assert_close(change(net)(x), expected)


@pytest.mark.parametrize(
    "host",
    [
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Identity(),
        nn.ConvTranspose2d(8, 8, 2),
        ConvBN(nn.ReLU()),
        Normed(),
    ],
    ids=lambda host: type(host).__name__,
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # norms test the traced sizes
def test_attach_where_names_any_module(host: nn.Module, x: Tensor) -> None:
    net = nn.Sequential(nn.Identity(), host).eval()
    with torch.no_grad():
        expected = simam(net(x.clone()), 0.1)
        attach(net, where=lambda path, module: module is host, e_lambda=0.1)
        assert torch.equal(net(x.clone()), expected)
        traced = torch.jit.trace(net, x.clone(), check_trace=False)
        torch.testing.assert_close(traced(x.clone()), expected)
    assert attached(net).keys() == {"1"}


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        (
            nn.Sequential(nn.ReLU(), nn.Identity()),
            "Sequential would run SimAM as one of its layers; name its last layer",
        ),
        (nn.ModuleList([nn.ReLU()]), "ModuleList has no forward; name a module that has one"),
    ],
)
def test_attach_refuses_a_container(host: nn.Module, problem: str) -> None:
    net = nn.Sequential(nn.Identity(), host)
    before = snapshot(net)
    message = f"cannot attach SimAM to 1: this {problem}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attach(net, where="1")
    assert snapshot(net) == before


def test_attach_refuses_a_module_that_was_folded(yolo_net: nn.Module) -> None:
    fold_every_conv_bn(yolo_net)
    with pytest.raises(ValueError, match="has a forward of its own on the instance"):
        attach(yolo_net, where="0.conv2")


@pytest.mark.parametrize("output", [torch.zeros(2, 8), (torch.zeros(2, 8, 4, 4),)])
def test_host_without_a_map_is_found_out_at_the_first_forward(output: object) -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> object:
            return output

    net = attach(nn.Sequential(Returns()), where="0")
    with pytest.raises((TypeError, ValueError), match=r"^x must (have shape|be a torch\.Tensor)"):
        net(torch.zeros(1))


def test_attach_refuses_a_second_simam_in_a_branch(yolo_net: nn.Module) -> None:
    attach(yolo_net, place="norm")
    before = snapshot(yolo_net)
    message = (
        "2 branches have SimAM at place='norm': 0.conv2.bn, 1.conv2.bn. Remove it first: "
        "simam.detach(model)"
    )
    for place in ("conv", "branch"):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attach(yolo_net, place=place)
    assert snapshot(yolo_net) == before
    attach(yolo_net, place="norm", e_lambda=0.1)
    assert [layer.e_lambda for layer in attached(yolo_net).values()] == [0.1, 0.1]


def test_attach_accepts_another_place_with_the_same_host(net: nn.Module) -> None:
    attach(attach(net, place="norm"), place="branch", e_lambda=0.1)
    assert [layer.e_lambda for layer in attached(net).values()] == [0.1]


@pytest.mark.parametrize("place", ["conv", "norm", "branch"])
def test_folding_of_ultralytics_keeps_simam(yolo_net: nn.Module, x: Tensor, place: str) -> None:
    before = [(path, type(module)) for path, module in yolo_net.named_modules()]
    attach(yolo_net, e_lambda=0.1, place=place)
    weights = copy.deepcopy(yolo_net.state_dict())
    with torch.no_grad():
        expected = yolo_net(x)
        folded = fold_every_conv_bn(copy.deepcopy(yolo_net))
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fold_every_conv_bn(folded)(x), expected, rtol=1e-4, atol=1e-4)
    assert len(attached(folded)) == 2
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (0 if place == "branch" else 2)
    # The network that was not folded is as before.
    assert all(torch.equal(weights[key], tensor) for key, tensor in yolo_net.state_dict().items())
    detach(yolo_net)
    assert [(path, type(module)) for path, module in yolo_net.named_modules()] == before


def test_norm_with_simam_refuses_conversion(net: nn.Module, x: Tensor) -> None:
    net[0].norm1 = nn.Identity()
    attach(net, place="norm")
    before, expected = snapshot(net), net(x)
    message = r"^cannot fold or convert this BatchNorm2d: its output passes through SimAM"
    for change in (
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda net: fuse_conv_bn_eval(net[0].conv2, net[0].norm2),
    ):
        with pytest.raises(RuntimeError, match=message):
            change(net)
    assert snapshot(net) == before
    assert torch.equal(net(x), expected)
    assert isinstance(net[0].norm2.simam, SimAM)


def test_norm_with_simam_trains_and_counts_batches(net: nn.Module, x: Tensor) -> None:
    attach(net.train(), place="norm")
    net(x).sum().backward()
    assert net[0].norm2.num_batches_tracked == 1
    assert net[0].norm2.weight.grad is not None
