"""Networks with SimAM for timm's registry; importing this module registers their names.

Each is a timm network with SimAM where the paper puts it: after the 3x3 or depthwise convolution of
every block, before the norm. timm's own `attn_layer=` would put SimAM after the norm.

Each model takes the arguments of the timm model whose name lacks the prefix `simam_`, and
`e_lambda` (float, by default 0.1, the authors' value for ImageNet) and `place` (str, by default
"conv"; see `simam.plan`). Weights come from a file, by `checkpoint_path=` or by `pretrained=True,
pretrained_cfg_overlay=dict(file=...)`. With `place="conv"`, files in the layout of the authors'
networks load too, such as those that they published.

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
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .attach import attach
from .checkpoints import E_LAMBDA, is_authors, rename, trained_e_lambda, unknown_e_lambda
from .hosts import is_host
from .messages import install_hint
from .module import SimAM
from .state_dict import unwrap, without_profile

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import (
        generate_default_cfgs,
        load_state_dict,
        model_entrypoint,
        register_model,
        resolve_pretrained_cfg,
    )
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
    raise ImportError(f"simam.models needs timm ({error}); {install_hint('timm')}") from error

_Entry: TypeAlias = Callable[..., nn.Module]

# timm filters their weights itself, and then takes no filter of ours. The authors have no such
# networks, so there is nothing to rename.
_FILTERED_BY_TIMM = {"convnext_tiny", "regnety_008"}


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
    place: str = "conv",
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
    if base in _FILTERED_BY_TIMM:
        cfg = _without_profile_of_thop(cfg) if pretrained else cfg
    else:
        kwargs["pretrained_filter_fn"] = partial(
            _to_own_names, e_lambdas={e_lambda}, is_at_conv=place == "conv"
        )
    model: nn.Module = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
    used_cfg: Any = model.pretrained_cfg
    if cfg.file:
        used_cfg.pop("state_dict", None)  # the content of the file
    register: Any = model.register_load_state_dict_pre_hook
    register(_to_own_names_before_loading)
    if place != "conv":
        return attach(model, e_lambda=e_lambda, place=place)
    # Selected by name: with features_only=True, timm may have cut the blocks apart, and the
    # analysis of `plan` needs whole blocks.
    names = (".conv2", ".conv2.conv", ".conv_dw")
    convolutions = [path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    hosts = [path for path in convolutions if path.endswith(names)]
    return attach(model, e_lambda=e_lambda, where=hosts) if hosts else model


def _without_profile_of_thop(cfg: Any) -> Any:
    """Read the weights of the file that a configuration names, without what thop left."""
    if cfg.source:  # a folder or a hub
        return cfg
    state = cfg.state_dict or (load_state_dict(cfg.file) if cfg.file else None)
    return replace(cfg, state_dict=without_profile(state, ())) if state else cfg


def _to_own_names(
    content: Mapping[str, Any], model: nn.Module, e_lambdas: set[float], is_at_conv: bool
) -> Mapping[str, Any]:
    """Rename the tensors of an authors' file to the network's names, without what thop left."""
    own = model.state_dict()
    state = without_profile(unwrap(content), own)
    if not is_authors(key for key in state if key not in own):
        return without_profile(content, own)
    if not is_at_conv:
        raise ValueError(
            "the file has SimAM behind convolutions, as the authors' networks do, but this network "
            'has it elsewhere, so its outputs would differ; create the model with place="conv"'
        )
    trained = trained_e_lambda(state)
    if trained is None and e_lambdas:
        warnings.warn(unknown_e_lambda("the file", e_lambdas), stacklevel=2)
    elif trained is not None and e_lambdas - {trained}:
        warnings.warn(
            f"these weights were trained with e_lambda={trained}, but this network was built with "
            f"{', '.join(f'{other:g}' for other in sorted(e_lambdas - {trained}))}; pass "
            f"e_lambda={trained} for the value of the weights",
            stacklevel=2,
        )
    return rename(state, own)


def _to_own_names_before_loading(
    model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    e_lambdas = {layer.e_lambda for layer in model.modules() if isinstance(layer, SimAM)}
    inner = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    others = {k: t for k, t in state.items() if not k.startswith(prefix)}
    hosts = [module for module in model.modules() if is_host(module)]
    is_at_conv = all(isinstance(host, nn.Conv2d) for host in hosts)
    renamed = _to_own_names(inner, model, e_lambdas, is_at_conv)
    state.clear()
    state.update(others | {f"{prefix}{key}": tensor for key, tensor in renamed.items()})


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
