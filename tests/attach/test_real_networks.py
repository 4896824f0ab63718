"""attach and detach on real networks."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from simam import SimAM, attach, detach
from tests.helpers.by_hand import (
    EVERY_CLASS,
    HOSTS,
    ByHand,
    by_hand,
    example,
    parameter_names,
    plain,
    run,
    sampled,
    sampled_elsewhere,
)

# The pyramid of the detection model takes a list and is not residual: attach warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:left without SimAM:UserWarning")


def distance(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max())


def modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", sampled(HOSTS.keys() - {"torchvision/fasterrcnn_resnet50_fpn"}))
def test_attach_matches_simam_written_by_hand(name: str) -> None:
    check_against_simam_written_by_hand(name, "conv")


QUICK_ELSEWHERE = {
    ("torchvision/resnet18", "branch"),
    ("timm/mobilenetv3_small_100", "norm"),  # a norm with its activation
}


@pytest.mark.parametrize(("name", "place"), sampled_elsewhere(QUICK_ELSEWHERE))
def test_attach_at_other_places_matches_simam_written_by_hand(name: str, place: str) -> None:
    check_against_simam_written_by_hand(name, place)


def check_against_simam_written_by_hand(name: str, place: str) -> None:
    model = plain(name).double()
    reference = by_hand(model, name, 0.1, place)
    x = example(name).double()
    with torch.no_grad():
        without, expected = run(model.eval(), x), run(reference.eval(), x)
        torch.testing.assert_close(run(attach(model, e_lambda=0.1, place=place), x), expected)
        assert without.shape != expected.shape or distance(without, expected) > 1e-3

    outputs, gradients = [], []
    for network in (model.train(), reference.train()):
        torch.manual_seed(2)  # for dropout
        outputs.append(run(network, x))
        outputs[-1].backward(torch.randn_like(outputs[-1]))
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(*outputs)
    assert [n for n, _ in model.named_parameters()] == parameter_names(reference)
    # All gradients together: a bias before a batch norm has a gradient of rounding errors only.
    assert distance(*(torch.cat([g.flatten() for g in each]) for each in gradients)) < 1e-9


@pytest.mark.parametrize("name", sampled(EVERY_CLASS))
def test_attach_loads_weights_before_and_after_and_detach_restores(name: str) -> None:
    model, other = plain(name).eval(), plain(name).eval()
    x, before, weights = example(name), modules(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = run(model, x)
        attach(model)
        assert list(model.state_dict()) == list(weights)
        assert model.load_state_dict(weights, strict=True) == ([], [])
        assert other.load_state_dict(model.state_dict(), strict=True) == ([], [])
        detach(model)
        assert modules(model) == before
        assert model.load_state_dict(weights, strict=True) == ([], [])
        assert torch.equal(run(model, x), expected)
        assert torch.equal(run(other, x), expected)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", sampled(EVERY_CLASS))
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_attached_networks_can_be_copied_and_pickled(
    name: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model = plain(name).eval()
    before, attached = modules(model), modules(attach(model, e_lambda=0.1))
    copied = duplicate(model)
    assert modules(copied) == attached
    with torch.no_grad():
        assert torch.equal(run(copied, example(name)), run(model, example(name)))
    assert modules(detach(copied)) == before
    assert modules(model) == attached
    assert not any(isinstance(module, SimAM) for module in copied.modules())


HALF = ["torchvision/resnet18", "timm/tf_mobilenetv3_small_minimal_100"]


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attached_networks_run_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = plain(name).eval(), example(name)
    reference = by_hand(model, name, e_lambda=0.1).to(dtype)
    attach(model, e_lambda=0.1).to(dtype)
    with torch.no_grad():
        output, expected = model(x.to(dtype)), reference(x.to(dtype))
    assert output.dtype == dtype
    # float32 results that differ in the last bit may round to different halves.
    assert distance(output.float(), expected.float()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", HALF)
def test_attached_networks_run_under_autocast(name: str) -> None:
    model, x = plain(name), example(name)
    reference = by_hand(model, name, e_lambda=0.1)
    attach(model, e_lambda=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = model(x), reference(x)
    assert distance(output.float(), expected.float()) < 4 * torch.finfo(torch.bfloat16).eps


class BlockByHand(nn.Module):
    """torchvision's BasicBlock with SimAM between the second convolution and its norm."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention = ByHand(nn.Identity(), e_lambda=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block.bn1(self.block.conv1(x)).clamp(min=0)
        y = self.block.bn2(self.attention(self.block.conv2(y)))
        shortcut = x if self.block.downsample is None else self.block.downsample(x)
        return (y + shortcut).clamp(min=0)


def test_attach_matches_resnet18_of_blocks_written_by_hand() -> None:
    model, x = plain("torchvision/resnet18").eval(), example("torchvision/resnet18")
    written = copy.deepcopy(model)
    for stage in (written.layer1, written.layer2, written.layer3, written.layer4):
        stage[0], stage[1] = BlockByHand(stage[0]), BlockByHand(stage[1])
    with torch.no_grad():
        torch.testing.assert_close(attach(model, e_lambda=0.1)(x), written(x))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.sweep)])
def test_attach_at_the_end_of_the_branch_matches_the_attention_layer_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="builds the network")
    layer = partial(SimAM, e_lambda=0.1)
    built = timm.create_model(name, num_classes=10, block_args={"attn_layer": layer}).eval()
    model = plain(f"timm/{name}").eval()
    built.load_state_dict(model.state_dict())
    x = example(name)
    with torch.no_grad():
        without = model(x)
        output = attach(model, e_lambda=0.1, place="branch")(x)
        assert distance(output, without) > 1e-3
        assert torch.equal(output, built(x))
