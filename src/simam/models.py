"""Networks with SimAM for timm's registry; importing this module registers their names.

Each is a timm network with SimAM where the paper puts it: after the 3x3 or depthwise convolution of
every block, before the norm. timm's own `attn_layer=` would put SimAM after the norm.

Each model takes the arguments of the timm model whose name lacks the prefix `simam_`, and
`e_lambda` (float, by default 0.1, the authors' value for ImageNet). Weights come from a file, by
`checkpoint_path=` or by `pretrained=True, pretrained_cfg_overlay=dict(file=...)`. The files that
the authors published for some of these networks load too.

Examples:
    >>> import timm, torch
    >>> import simam.models
    >>> timm.list_models("simam_resnet*")[:3]
    ['simam_resnet18', 'simam_resnet34', 'simam_resnet50']
    >>> model = timm.create_model("simam_resnet18", num_classes=10)
    >>> model(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .attach import attach
from .checkpoints import E_LAMBDA, is_authors, rename
from .messages import install_hint
from .module import SimAM
from .state_dict import unwrap

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import (
        generate_default_cfgs,
        model_entrypoint,
        register_model,
        resolve_pretrained_cfg,
    )
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
    raise ImportError(f"simam.models needs timm ({error}); {install_hint('timm')}") from error

_Entry: TypeAlias = Callable[..., nn.Module]

_PUBLISHED = {"resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "mobilenetv2_100"}


def _cfg(first_conv: str, classifier: str, interpolation: str = "bilinear") -> dict[str, Any]:
    """Configure a model without weights, and the image transforms of the authors' evaluation."""
    return {
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": interpolation,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "simam_resnet18": _cfg("conv1", "fc"),
        "simam_resnet34": _cfg("conv1", "fc"),
        "simam_resnet50": _cfg("conv1", "fc"),
        "simam_resnet101": _cfg("conv1", "fc"),
        "simam_resnet152": _cfg("conv1", "fc"),
        "simam_resnet50d": _cfg("conv1.0", "fc"),
        "simam_resnext50_32x4d": _cfg("conv1", "fc"),
        "simam_mobilenetv2_100": _cfg("conv_stem", "classifier"),
        "simam_efficientnet_b0": _cfg("conv_stem", "classifier", "bicubic"),
        "simam_convnext_tiny": _cfg("stem.0", "head.fc", "bicubic"),
        "simam_regnety_008": _cfg("stem.conv", "head.fc", "bicubic"),
    }
)


def _create(
    base: str,
    pretrained: bool,
    *,
    e_lambda: float = E_LAMBDA,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    SimAM(e_lambda=e_lambda)  # refuses a wrong value before the network is built
    name = f"simam_{base}"
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(  # the type that timm raises
            f"there are no weights to download for {name}; give a file: pretrained=True, "
            "pretrained_cfg_overlay=dict(file=...), or start from the weights of the network "
            f"without SimAM: simam.attach(timm.create_model({base!r}, pretrained=True), "
            f"e_lambda={e_lambda:g}), which needs fine-tuning"
        )
    if base in _PUBLISHED:
        kwargs["pretrained_filter_fn"] = partial(_to_own_names, e_lambdas={e_lambda})
    model: nn.Module = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    if base in _PUBLISHED:
        register: Any = model.register_load_state_dict_pre_hook
        register(_rename_before_loading)
    # Selected by name: with features_only=True, timm may have cut the blocks apart, and the
    # analysis of `plan` needs whole blocks.
    names = (".conv2", ".conv2.conv", ".conv_dw")
    convolutions = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    hosts = [path for path in convolutions if path.endswith(names)]
    return attach(model, e_lambda=e_lambda, where=hosts) if hosts else model


def _to_own_names(
    content: Mapping[str, Any], model: nn.Module, e_lambdas: set[float]
) -> Mapping[str, Any]:
    """Rename the tensors of an authors' file to the network's names; keep any other content."""
    state = unwrap(content)
    if not is_authors(state):
        return content
    others = sorted(e_lambdas - {E_LAMBDA})
    if others:
        warnings.warn(
            f"these weights were trained with e_lambda={E_LAMBDA}, but this network was built with "
            f"{', '.join(f'{other:g}' for other in others)}; leave e_lambda out for the value of "
            "the weights",
            stacklevel=2,
        )
    return rename(state, model.state_dict())


def _rename_before_loading(model: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    e_lambdas = {layer.e_lambda for layer in model.modules() if isinstance(layer, SimAM)}
    renamed = dict(_to_own_names(state, model, e_lambdas))
    state.clear()
    state.update(renamed)


@register_model
def simam_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with SimAM."""
    return _create("resnet18", pretrained, **kwargs)


@register_model
def simam_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with SimAM."""
    return _create("resnet34", pretrained, **kwargs)


@register_model
def simam_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with SimAM."""
    return _create("resnet50", pretrained, **kwargs)


@register_model
def simam_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with SimAM."""
    return _create("resnet101", pretrained, **kwargs)


@register_model
def simam_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 with SimAM."""
    return _create("resnet152", pretrained, **kwargs)


@register_model
def simam_resnet50d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50-D with SimAM."""
    return _create("resnet50d", pretrained, **kwargs)


@register_model
def simam_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-50 32x4d with SimAM."""
    return _create("resnext50_32x4d", pretrained, **kwargs)


@register_model
def simam_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 with SimAM."""
    return _create("mobilenetv2_100", pretrained, **kwargs)


@register_model
def simam_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientNet-B0 with SimAM."""
    return _create("efficientnet_b0", pretrained, **kwargs)


@register_model
def simam_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvNeXt-T with SimAM."""
    return _create("convnext_tiny", pretrained, **kwargs)


@register_model
def simam_regnety_008(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RegNetY-800MF with SimAM."""
    return _create("regnety_008", pretrained, **kwargs)
