"""plan on public networks, against a list of facts about where SimAM goes."""

import inspect
import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from simam import attach, plan
from simam.placement import PLACES

timm = pytest.importorskip("timm", reason="the list names models of timm")
torchvision = pytest.importorskip("torchvision", reason="the list names models of torchvision")

EXPECTED = json.loads(Path(__file__).with_name("insertion_points.json").read_text())

# One model for each way to build or gate a block, and for each convolution subclass. The other
# models of torchvision repeat these blocks at other widths and depths.
TORCHVISION_SAMPLE = {
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "maxvit_t",
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
    "r3d_18",
    "mc3_18",
    "r2plus1d_18",
    "raft_small",
}
TIMM_SAMPLE = {
    "resnet18",
    "resnetv2_50x1_bit",  # pre-activation, StdConv2d
    "nfnet_l0",  # no norms, ScaledStdConv2d
    "seresnet18",
    "eca_resnext26ts",
    "gcresnet33ts",
    "skresnet18",  # parallel convolutions weighted by a softmax
    "resnest14d",  # a softmax over the groups of one convolution
    "res2net50d",  # a chain of concatenated convolutions
    "cspresnet50w",
    "dla34",  # sums of trees
    "hrnet_w18_small_v2",  # sums of resolutions
    "resnetblur50",  # a fixed filter after the convolution
    "regnety_002",
    "efficientnet_lite0",
    "tf_mobilenetv3_small_minimal_100",  # Conv2dSame
    "mixnet_s",  # MixedConv2d
    "mobilenetv4_conv_small_035",  # two depthwise convolutions
    "repghostnet_050",  # re-parameterisable sums
    "convnext_tiny",
    "inception_next_tiny",  # parallel convolutions beside an identity
    "edgenext_small",
    "botnet26t_256",  # attention in the branch
    "lambda_resnet50ts",
    "coatnet_0_224",
    "pvt_v2_b2_li",
    "mobilevitv2_050",
    "test_mambaout",
}
NONE_SAMPLE = {
    "timm/inception_v3",
    "timm/lcnetv2_small",  # no skips at all
    "timm/levit_128",
    "timm/repvit_m1",
    "timm/selecsls42",
    "timm/test_vit2",
    "timm/twins_svt_small",
}


def sampled(names, sample):
    """Test cases; names outside the sample run only with -m sweep."""
    return [pytest.param(n, marks=[] if n in sample else pytest.mark.sweep) for n in names]


def build(library: str, name: str) -> nn.Module:
    """The model on the meta device, where tensors hold no values and size costs nothing."""
    if library == "timm":
        if not timm.is_model(name):
            pytest.skip(f"{name} is not in timm {timm.__version__}")
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)
    builder = torchvision.models.get_model_builder(name)
    accepted = {"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys()
    # torchvision computes the widths of a regnet with tensors, which must hold values.
    on_cpu = {f: partial(getattr(torch, f), device="cpu") for f in ("arange", "tensor")}
    widths = mock.patch.multiple(torch, **on_cpu) if "regnet" in name else nullcontext()
    with torch.device("meta"), widths:
        return builder(**dict.fromkeys(accepted))


def example(library: str, name: str, model: nn.Module) -> object:
    """What the model takes, without values."""
    empty = partial(torch.empty, device="meta")
    if library == "timm":
        return empty(2, *model.pretrained_cfg["input_size"])
    if "raft" in name:
        return empty(1, 3, 128, 128), empty(1, 3, 128, 128)
    if type(model).__module__.startswith("torchvision.models.detection"):
        return ([empty(3, 224, 224)],)
    is_video = "video" in type(model).__module__
    return empty(1, 3, 16, 224, 224) if is_video else empty(1, 3, 224, 224)


# Those for which the record of a run may differ most from the code.
EXAMPLES = {
    *("maskrcnn_resnet50_fpn", "raft_small", "r3d_18", "mobilenet_v2"),
    *("skresnet18", "res2net50d", "dla34", "repghostnet_050", "edgenext_small", "resnest14d"),
}


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[] if name in EXAMPLES else pytest.mark.sweep)
        for library in ("torchvision", "timm")
        for name in EXPECTED[library]
    ],
)
def test_plan_with_an_example_matches_facts(library: str, name: str) -> None:
    model = build(library, name)
    planned = plan(model, example=example(library, name, model))
    assert sorted(i.path for i in planned) == sorted(EXPECTED[library][name])


@pytest.mark.sweep
@pytest.mark.parametrize("name", EXPECTED["none"])
def test_plan_with_an_example_refuses_networks_without_residual_branches(name: str) -> None:
    model = build(*name.split("/"))
    with pytest.raises(ValueError, match=r"^found no place for SimAM"):
        plan(model, example=example(*name.split("/"), model))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_plan_with_an_example_equals_the_plan_at_every_place(name: str, place: str) -> None:
    model = build("torchvision", name)
    with_example = plan(model, place=place, example=example("torchvision", name, model))
    assert with_example == plan(model, place=place)


@pytest.mark.parametrize("name", sampled(EXPECTED["torchvision"], TORCHVISION_SAMPLE))
def test_plan_matches_facts_for_torchvision(name: str) -> None:
    model = build("torchvision", name)
    assert sorted(i.path for i in plan(model)) == sorted(EXPECTED["torchvision"][name])


@pytest.mark.parametrize("name", sampled(EXPECTED["timm"], TIMM_SAMPLE))
def test_plan_matches_facts_for_timm(name: str) -> None:
    model = build("timm", name)
    assert sorted(i.path for i in plan(model)) == sorted(EXPECTED["timm"][name])


# torchvision warns about the initial weights of googlenet and inception_v3: not tested here.
@pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")
@pytest.mark.parametrize(
    "name",
    sampled(
        EXPECTED["none"], {n for n in EXPECTED["none"] if n.startswith("torchvision")} | NONE_SAMPLE
    ),
)
def test_attach_refuses_networks_without_residual_branches(name: str) -> None:
    model = build(*name.split("/"))
    before = [(path, type(module)) for path, module in model.named_modules()]
    message = (
        f"found no place for SimAM in this {type(model).__name__}: no residual block whose branch "
        "holds a spatial (kernel > 1) convolution and a non-linearity. "
    )
    convolutions = [p for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    spatial = [p for p in convolutions if max(model.get_submodule(p).kernel_size) > 1]
    message += f"Choose hosts with where=, for example where={spatial[-1]!r}." if spatial else ""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        attach(model)  # raises the error of plan
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_facts_contain_the_samples() -> None:
    assert EXPECTED["torchvision"].keys() >= TORCHVISION_SAMPLE
    assert EXPECTED["timm"].keys() >= TIMM_SAMPLE
    assert set(EXPECTED["none"]) >= NONE_SAMPLE
