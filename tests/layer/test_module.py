"""SimAM as a layer: its constructor, and as a drop-in for the authors' module and in timm."""

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import simam
from simam import SimAM
from simam import functional as F

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize(
    ("layer", "e_lambda"),
    [
        (SimAM(), 1e-4),
        (SimAM(64), 1e-4),
        (SimAM(64, 1e-3), 1e-3),
        (SimAM(e_lambda=0.1), 0.1),
        (SimAM(None, 1), 1.0),
        (SimAM(channels=64, e_lambda=0.1), 0.1),
        (SimAM(0), 1e-4),  # all channels pruned
        (SimAM(64, device="cpu", dtype=torch.float16), 1e-4),
    ],
    ids=repr,
)
def test_SimAM_constructor_sets_the_options(layer: SimAM, e_lambda: float) -> None:
    assert layer.e_lambda == e_lambda
    assert isinstance(layer.e_lambda, float)
    assert layer.statistics == "shared"


@pytest.mark.parametrize("statistics", ["shared", "leave_one_out"])
def test_SimAM_forward_equals_simam(statistics: str, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    expected = F.simam(x, 0.1, statistics=statistics)
    assert torch.equal(SimAM(3, 0.1, statistics=statistics)(x), expected)


def test_SimAM_ignores_channels() -> None:
    x = torch.ones(1, 3, 4, 5)
    assert torch.equal(SimAM(64)(x), SimAM()(x))


def test_SimAM_has_the_defaults_of_simam() -> None:
    layer, function = inspect.signature(SimAM), inspect.signature(F.simam)
    for name in ("e_lambda", "statistics"):
        assert layer.parameters[name] == function.parameters[name]


def test_simam_package_exports_its_public_names() -> None:
    assert {"SimAM", "functional"} <= set(simam.__all__)
    assert all(hasattr(simam, name) for name in simam.__all__)


def test_SimAM_repr() -> None:
    assert repr(SimAM(64)) == "SimAM(e_lambda=0.0001, statistics='shared')"
    layer = SimAM(e_lambda=0.1, statistics="leave_one_out")
    assert repr(layer) == "SimAM(e_lambda=0.1, statistics='leave_one_out')"


def test_SimAM_has_no_parameters_buffers_or_state() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    attentive = nn.Sequential(plain[0], nn.Sequential(plain[1], SimAM(4)))
    assert not list(SimAM(4).parameters())
    assert not list(SimAM(4).buffers())
    assert not SimAM(4).state_dict()
    assert attentive.load_state_dict(plain.state_dict()) == ([], [])


@pytest.mark.parametrize(
    "restore", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_SimAM_deepcopy_and_pickle(restore: Callable[[SimAM], SimAM]) -> None:
    layer = SimAM(64, 0.1, statistics="leave_one_out")
    restored = restore(layer)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert restored is not layer
    assert repr(restored) == repr(layer)
    assert torch.equal(restored(x), layer(x))


def test_SimAM_refuses_lambda_as_the_first_argument() -> None:
    message = (
        "channels must be an integer or None, got 0.1; "
        "for the regulariser write SimAM(e_lambda=0.1)"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        SimAM(0.1)


@pytest.mark.parametrize("channels", [64.0, True, False, "64"])
def test_SimAM_refuses_channels_that_are_not_an_integer(channels: object) -> None:
    message = f"channels must be an integer or None, got {channels!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        SimAM(channels)


def test_SimAM_refuses_negative_channels() -> None:
    with pytest.raises(ValueError, match=r"^channels must not be negative, got -1$"):
        SimAM(-1)


@pytest.mark.parametrize("e_lambda", ["0.1", None, True, [0.1], 1j])
def test_SimAM_refuses_lambda_that_is_not_a_number(e_lambda: object) -> None:
    message = f"e_lambda must be a number, got {e_lambda!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        SimAM(64, e_lambda)


@pytest.mark.parametrize("e_lambda", [0, -0.1, math.nan, math.inf])
def test_SimAM_refuses_invalid_lambda(e_lambda: float) -> None:
    message = (
        f"e_lambda must be a positive, finite number, got {float(e_lambda)}; "
        "the authors use 1e-4 (CIFAR) and 0.1 (ImageNet)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SimAM(64, e_lambda)


def test_SimAM_refuses_unknown_statistics() -> None:
    message = "statistics must be 'shared' or 'leave_one_out', got 'exact'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SimAM(64, statistics="exact")


def test_SimAM_refuses_the_inputs_that_simam_refuses() -> None:
    with pytest.raises(
        ValueError, match=re.escape("x must have shape (N, C, *spatial), got [4, 5]")
    ):
        SimAM()(torch.ones(4, 5))


@pytest.mark.parametrize(
    ("attn_layer", "e_lambda"), [(SimAM, 1e-4), (partial(SimAM, e_lambda=0.1), 0.1)]
)
def test_SimAM_as_attn_layer_of_timm(attn_layer: type[SimAM], e_lambda: float) -> None:
    timm = pytest.importorskip("timm", reason="timm is an optional dependency")
    create = partial(timm.create_model, "resnet18", num_classes=3, zero_init_last=False)
    plain = create().eval()
    attentive = create(block_args={"attn_layer": attn_layer}).eval()
    attentive.load_state_dict(plain.state_dict())

    layers = [module for module in attentive.modules() if isinstance(module, SimAM)]
    assert len(layers) == 8  # one per basic block
    assert {layer.e_lambda for layer in layers} == {e_lambda}
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    output = attentive(x)
    assert output.shape == (1, 3)
    assert not torch.allclose(output, plain(x))
