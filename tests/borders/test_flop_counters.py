"""Counters of operations and parameters: some go by the exact class of a layer, and miss hosts."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from simam import attach, attached, detached
from tests.helpers.borders import needs, tool

pytestmark = needs("torchvision")

IMAGES = (1, 3, 224, 224)
# Those of the convolutions and of the last layer; counters differ in what they add.
MULTIPLY_ADDS = 1_814_073_344
PARAMETERS = 11_689_512
HOSTS = 8

Counts = tuple[int, int]


def count_with_thop(model: nn.Module, **options: Any) -> Counts:
    from thop import profile

    return profile(model, inputs=(torch.rand(IMAGES),), verbose=False, **options)


def count_with_torchinfo(model: nn.Module) -> Counts:
    from torchinfo import summary

    counted = summary(model, input_size=IMAGES, verbose=0)
    return counted.total_mult_adds, counted.total_params


def count_with_ptflops(model: nn.Module, **options: Any) -> Counts:
    from ptflops import get_model_complexity_info

    quiet = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return get_model_complexity_info(model, IMAGES[1:], **quiet, **options)


def count_with_aten_of_ptflops(model: nn.Module) -> Counts:
    return count_with_ptflops(model, backend="aten")


def count_with_fvcore(model: nn.Module) -> Counts:
    from fvcore.nn import FlopCountAnalysis, parameter_count

    counted = FlopCountAnalysis(model, torch.rand(IMAGES))
    return counted.total(), parameter_count(model)[""]


def count_with_torch(model: nn.Module) -> Counts:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.rand(IMAGES))
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def count_with_calflops(model: nn.Module) -> Counts:
    from calflops import calculate_flops

    quiet = {"output_as_string": False, "print_results": False}
    _, multiply_adds, parameters = calculate_flops(model, input_shape=IMAGES, **quiet)
    return multiply_adds, parameters


class Counter(NamedTuple):
    name: str
    module: str
    count: Callable[[nn.Module], Counts]
    sees_hosts: bool


def thop_name() -> str:
    """Two distributions have a module of this name; the one that comes first is imported."""
    import thop

    return f"{'ultralytics-' * thop.__version__.startswith('2')}thop {thop.__version__}"


COUNTERS = [
    Counter("thop", "thop", count_with_thop, False),
    Counter("torchinfo", "torchinfo", count_with_torchinfo, False),
    Counter("ptflops, backend pytorch", "ptflops", count_with_ptflops, False),
    Counter("ptflops, backend aten", "ptflops", count_with_aten_of_ptflops, True),
    Counter("fvcore", "fvcore", count_with_fvcore, True),
    Counter("torch, utils.flop_counter", "torch", count_with_torch, True),
    Counter("calflops", "calflops", count_with_calflops, True),
]


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18().eval()


@pytest.mark.parametrize(
    "counter",
    [
        pytest.param(
            counter,
            marks=pytest.mark.skipif(find_spec(counter.module) is None, reason="not installed"),
            id=counter.name,
        )
        for counter in COUNTERS
    ],
)
def test_detached_makes_every_counter_right(counter: Counter, record: Callable[..., None]) -> None:
    name, module, count, sees_hosts = counter
    if module == "thop":
        name, sees_hosts = thop_name(), thop_name().startswith("ultralytics")
    else:
        name = tool(module) + name.removeprefix(module)

    def counts(context: Callable[[nn.Module], Any], model: nn.Module) -> Counts:
        with context(model):
            multiply_adds, parameters = count(model)
        return int(multiply_adds), int(parameters)

    plain = counts(nullcontext, resnet18())
    assert plain == pytest.approx((MULTIPLY_ADDS, PARAMETERS), rel=0.01)
    with_simam = counts(nullcontext, attach(resnet18()))
    assert (with_simam == plain) is sees_hosts
    model = attach(resnet18())
    assert counts(detached, model) == plain
    assert len(attached(model)) == HOSTS
    record(
        name,
        "count ResNet-18",
        "works" if sees_hosts else "works, with a note",
        plain=plain,
        attached=with_simam,
        detached=plain,
    )


@pytest.mark.skipif(find_spec("thop") is None, reason="not installed")
def test_thop_counts_hosts_with_custom_ops() -> None:
    from thop.vision.basic_hooks import count_convNd

    model = attach(resnet18())
    hosts = {type(model.get_submodule(path)) for path in attached(model)}
    counted = count_with_thop(model, custom_ops=dict.fromkeys(hosts, count_convNd))
    assert counted == count_with_thop(resnet18())


@pytest.mark.skipif(find_spec("ptflops") is None, reason="not installed")
def test_ptflops_counts_hosts_with_custom_modules_hooks() -> None:
    from ptflops.pytorch_ops import conv_flops_counter_hook

    model = attach(resnet18())
    hosts = {type(model.get_submodule(path)) for path in attached(model)}
    hooks = dict.fromkeys(hosts, conv_flops_counter_hook)
    assert count_with_ptflops(model, custom_modules_hooks=hooks) == count_with_ptflops(resnet18())
