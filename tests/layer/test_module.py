"""SimAM as a layer: its constructor, and as a drop-in for the authors' module and in timm."""

import copy
import inspect
import io
import math
import pickle
import re
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import simam
from simam import SimAM
from simam import functional as F
from tests.helpers.docs import run_section

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize(
    ("layer", "e_lambda"),
    [
        (SimAM(), 1e-4),
        (SimAM(64), 1e-4),
        (SimAM(64, 1e-3), 1e-3),
        (SimAM(e_lambda=0.1), 0.1),
        (SimAM(None, 1.0), 1.0),
        (SimAM(64, 128.0), 128.0),
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
        "for the regulariser write SimAM(e_lambda=0.1), in a row of YAML [null, 0.1]"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        SimAM(0.1)


@pytest.mark.parametrize("row", ["[1e-4]", "[0.0001]", "[1e-05]", "[64, 1e-4]"])
def test_SimAM_names_a_number_that_YAML_reads(row: str) -> None:
    yaml = pytest.importorskip("yaml", reason="reads the row and the hint")
    with pytest.raises(TypeError, match="YAML") as caught:
        SimAM(*yaml.safe_load(row))
    hint = re.search(r"YAML (\[.*\])$", str(caught.value))
    expected = float(row.strip("[]").split()[-1])
    if hint:
        assert SimAM(*yaml.safe_load(hint[1])).e_lambda == expected
    else:  # e_lambda, which YAML read as text
        number = re.search(r"write the number (\S+)\. YAML", str(caught.value))
        assert number is not None
        assert yaml.safe_load(number[1]) == expected


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
    hint = "; write the number 0.1. YAML reads 1e-4 as text" * (e_lambda == "0.1")
    with pytest.raises(TypeError, match=f"^{re.escape(message + hint)}$"):
        SimAM(64, e_lambda)


CHANNELS = (
    "e_lambda must be a float, got the integer 128, which looks like a number of output channels; "
    "SimAM keeps the number of channels and takes only one. If lambda is meant, write "
    "e_lambda=128.0"
)


@pytest.mark.parametrize("arguments", [(64, 128), (None, 128), (64, 128, 1e-4)])
def test_SimAM_refuses_output_channels(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(CHANNELS)}$"):
        SimAM(*arguments)


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_SimAM_refuses_output_channels_of_numpy(kind: str) -> None:
    numpy = pytest.importorskip("numpy", reason="makes the number")
    with pytest.raises(TypeError, match=f"^{re.escape(CHANNELS)}$"):
        SimAM(64, e_lambda=getattr(numpy, kind)(128))


def test_attach_refuses_an_integer_as_lambda() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(TypeError, match=r"got the integer 1, .* write e_lambda=1\.0$"):
        simam.attach(model, where="0", e_lambda=1)
    assert type(model[0]) is nn.Conv2d


def test_functional_simam_accepts_an_integer_as_lambda() -> None:
    x = torch.rand(1, 2, 3, 3)
    assert torch.equal(F.simam(x, 1), SimAM(e_lambda=1.0)(x))


def test_SimAM_refuses_more_arguments_without_a_name() -> None:
    message = (
        "expected at most channels and e_lambda without a name, got also 'leave_one_out'; "
        "write statistics=, device= or dtype="
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        SimAM(64, 0.1, "leave_one_out")


@pytest.mark.parametrize("e_lambda", [0.0, -0.1, math.nan, math.inf])
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


def test_SimAM_get_module_name_on_the_class_and_in_a_partial() -> None:
    # The blocks of the authors' networks ask both.
    assert SimAM.get_module_name() == "simam"
    assert partial(SimAM, e_lambda=0.1).func.get_module_name() == "simam"


def handwritten_class() -> type[nn.Module]:
    """A SimAM as it stands in other repositories: no `statistics`, and an activation as a child."""

    class Attention(nn.Module):
        def __init__(self, e_lambda: float = 1e-4) -> None:
            super().__init__()
            self.act, self.e_lambda = nn.Sigmoid(), e_lambda

    return Attention


@pytest.mark.parametrize("attributes", [{"e_lambda": 0.1}, {}])
def test_SimAM_unpickles_a_handwritten_class_that_is_now_an_alias(
    attributes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, module = handwritten_class(), types.ModuleType("other_attention")
    kind.__module__, kind.__qualname__ = "other_attention", "Attention"
    monkeypatch.setitem(sys.modules, "other_attention", module)
    module.Attention = kind
    layer = kind()
    del layer.e_lambda
    vars(layer).update(attributes)
    pickled = pickle.dumps(layer)

    module.Attention = SimAM
    x = torch.rand(1, 2, 3, 3)
    for restored in (pickle.loads(pickled), copy.deepcopy(pickle.loads(pickled))):
        assert type(restored) is SimAM
        assert torch.equal(restored(x), SimAM(**attributes)(x))
        assert repr(restored).startswith(
            f"SimAM(\n  e_lambda={attributes.get('e_lambda', 1e-4):g},"
        )


def test_SimAM_as_plugin_of_mmcv_as_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    # mmcv looks a plugin up by its class name, and builds it with in_channels= and the options.
    registered: dict[str, Any] = {}

    class Registry:
        def register_module(self) -> Callable[[type], type]:
            return lambda kind: registered.setdefault(kind.__name__, kind)

    registry = types.ModuleType("mmengine.registry")
    registry.MODELS = Registry()
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.registry", registry)
    run_section("frameworks.md", "Plugins of mmcv")
    [(name, plugin)] = registered.items()
    assert (name, plugin._abbr_) == ("SimAMPlugin", "simam")
    layer = plugin(in_channels=64, e_lambda=0.1)
    x = torch.rand(1, 2, 3, 3)
    assert isinstance(layer, SimAM)
    assert torch.equal(layer(x), SimAM(e_lambda=0.1)(x))


def two_layers(e_lambda: float = 0.1, statistics: str = "shared") -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    return simam.attach(model, where=["0", "2"], e_lambda=e_lambda, statistics=statistics)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save({"state_dict": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.parametrize("route", [lambda state: state, through_a_file, copy.deepcopy])
def test_SimAM_records_its_options_beside_the_state_dict(route: Callable[[Any], Any]) -> None:
    model = two_layers(statistics="leave_one_out")
    state = route(model.state_dict())
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    options = {"version": 1, "e_lambda": 0.1, "statistics": "leave_one_out"}
    assert state._metadata["0.simam"] == options
    assert state._metadata["0"] == {"version": 1}


def test_SimAM_records_a_lambda_that_was_set_from_numpy_as_a_float() -> None:
    numpy = pytest.importorskip("numpy", reason="makes the number")
    model = two_layers()
    model[0].simam.e_lambda = numpy.float64(0.2)
    assert through_a_file(model.state_dict())._metadata["0.simam"]["e_lambda"] == 0.2


def test_SimAM_state_dict_into_a_plain_dict() -> None:
    destination: dict[str, Any] = {}
    two_layers().state_dict(destination=destination)
    assert len(destination) == 4


def test_load_state_dict_warns_once_of_other_options() -> None:
    state = through_a_file(two_layers(0.1).state_dict())
    model = two_layers(1e-4)
    message = (
        "0.simam: these weights were saved with e_lambda=0.1, statistics='shared', but this layer "
        "has e_lambda=0.0001, statistics='shared', so outputs may differ from those in training; "
        "the same may hold for other layers"
    )
    for _ in range(2):  # every load warns, whatever was loaded before
        with pytest.warns(UserWarning, match="saved with") as caught:
            assert model.load_state_dict(state) == ([], [])
        assert [str(warning.message) for warning in caught] == [message]
    with pytest.warns(UserWarning, match="statistics='leave_one_out', so"):
        two_layers(0.1, "leave_one_out").load_state_dict(state)


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state,
        through_a_file,
        copy.deepcopy,
        dict,  # as FSDP, timm and safetensors give it
        lambda state: OrderedDict((key, tensor) for key, tensor in state.items()),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_silent_about_its_own_weights(
    edit: Callable[[Any], Any], assign: bool
) -> None:
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(edit(two_layers().state_dict()), assign=assign)
        nn.DataParallel(model).load_state_dict(nn.DataParallel(two_layers()).state_dict())


def test_load_state_dict_is_silent_about_weights_without_metadata() -> None:
    state = two_layers(0.1).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_layers(1e-4).load_state_dict(dict(state))


def test_load_state_dict_of_plain_weights_is_silent() -> None:
    # The normal start of a fine-tuning.
    plain = simam.detach(two_layers()).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_layers().load_state_dict(through_a_file(plain))


def test_load_state_dict_of_DataParallel_warns() -> None:
    state = nn.DataParallel(two_layers(0.1)).state_dict()
    with pytest.warns(UserWarning, match=r"^module\.0\.simam: these weights") as caught:
        nn.DataParallel(two_layers(1e-4)).load_state_dict(state)
    assert len(caught) == 1
