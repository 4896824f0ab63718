"""Features taken out of attached networks, by the ways of torchvision, timm and hooks."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from simam import SimAM, attach, functional, plan
from tests.helpers.by_hand import by_hand, example, plain

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def keep(
    outputs: dict[str, Tensor], name: str, module: nn.Module, args: object, output: Tensor
) -> None:
    outputs[name] = output


def test_feature_extractor_of_torchvision_matches_by_hand() -> None:
    pytest.importorskip("torchvision", reason="extracts the features")
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = plain("torchvision/resnet18").eval(), example("torchvision/resnet18")
    reference, expected = by_hand(model, "torchvision/resnet18", e_lambda=0.1), {}
    for layer in LAYERS:
        reference.get_submodule(layer).register_forward_hook(partial(keep, expected, layer))
    extract = partial(create_feature_extractor, model)
    with torch.no_grad():
        reference(x)
        (convolved,) = extract(["layer1.0.conv2"])(x).values()
        attach(model, e_lambda=0.1)
        features = extract([*LAYERS, "layer1.0.conv2"])(x)
    attended = features.pop("layer1.0.conv2")
    torch.testing.assert_close(attended, functional.simam(convolved, 0.1))
    torch.testing.assert_close(features, expected)


def test_features_only_of_timm_matches_by_hand() -> None:
    timm = pytest.importorskip("timm", reason="builds the network")
    model = timm.create_model("resnet18", features_only=True, zero_init_last=False).eval()
    x = example("timm/resnet50")
    with torch.no_grad():
        *_, last = model(x)
        attach(model)
        assert [i.path for i in plan(model)] == [
            f"layer{stage}.{block}.conv2" for stage in range(1, 5) for block in range(2)
        ]
        features = model(x)
        *_, attached_last = features
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert not torch.allclose(attached_last, last)


def test_forward_intermediates_of_timm_match_by_hand() -> None:
    model, x = plain("timm/resnet50").eval(), example("timm/resnet50")
    reference = by_hand(model, "timm/resnet50", e_lambda=0.1)
    attach(model, e_lambda=0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_intermediates(x), reference.forward_intermediates(x)
        )


def test_forward_hooks_of_the_user_are_kept() -> None:
    model, x = plain("torchvision/resnet18").eval(), example("torchvision/resnet18")
    seen = {}
    model.layer1[0].conv2.register_forward_hook(lambda m, args, out: seen.update(convolution=out))
    attach(model, e_lambda=0.1)
    model.layer1[0].conv2.simam.register_forward_hook(
        lambda m, args, out: seen.update(before=args[0], after=out)
    )
    with torch.no_grad():
        model(x)
    assert seen["convolution"] is seen["after"]
    assert torch.equal(SimAM(e_lambda=0.1)(seen["before"]), seen["after"])
