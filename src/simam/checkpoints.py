"""The authors' published weights, into networks with SimAM attached.

In the authors' networks SimAM is a module between others, which gives some tensors other names
than they have in torchvision and timm. Here the names are translated; nothing is run from a file.
"""

import os
import re
import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor, nn

from .messages import first_few
from .module import SimAM
from .placement import check_module
from .state_dict import compare, load_strictly, read

E_LAMBDA = 0.1  # of every network whose weights the authors published

Model = TypeVar("Model", bound=nn.Module)

# The step that holds SimAM: in a ResNet (convolution, SimAM), where a network has the convolution
# alone; in MobileNetV2 (convolution, SimAM, norm, ...), of which the norm tells.
_STEP = re.compile(
    r"(?:backbone\.)?(layer\d+\.\d+\.conv2(?=\.0\.)|features\.\d+\.conv\.\d(?=\.2\.))"
)
_TO_TORCHVISION = (
    (r"^(layer\d+\.\d+\.conv2)\.0\.", r"\1."),
    (r"^(features\.\d+\.conv\.\d)\.2\.", r"\1.1."),
    (r"^classifier\.0\.", "classifier.1."),
)
_HEADS = {"fc", "classifier", "conv_head", "bn2"}  # what a network of features goes without


def load_checkpoint(model: Model, path: str | os.PathLike[str]) -> Model:
    """Load the authors' published weights into a network with SimAM, safely and strictly.

    Takes their ImageNet files (ResNet-18, 34, 50, 101, ResNeXt-50 32x4d, MobileNetV2) and the
    backbone of their detection files, for networks of torchvision or timm with SimAM attached and
    for the names of `simam.models`. A model with a backbone, as torchvision's detectors, gets the
    weights there, and all else stays as it is. A network without a classifier takes a file that
    has one. Files with the network's own names load too.

    Nothing but tensors is read from the file, and every tensor of the network is filled. Since
    the authors trained with `e_lambda=0.1`, their files set that on every SimAM layer.

    Args:
        model (nn.Module): the network, changed in place.
        path (str or PathLike): a file of `torch.save` or a `.safetensors` file: a state dict, or
            a dict that holds one as "state_dict" or "model".

    Returns:
        nn.Module: the model that was given.

    Raises:
        TypeError: model is not a module.
        OSError: the file cannot be opened.
        ValueError: the model has no SimAM, or has it at other places than the file's network; the
            file is damaged, could run code, holds no state dict, or does not fit, with the names
            that are missing, unexpected or of another shape. The model is then as it was.
        ImportError: a `.safetensors` file without safetensors installed.

    Warns:
        UserWarning: a SimAM layer had another `e_lambda`.

    Source:
        Yang et al., ICML 2021, and the files published with it.

    Examples:
        >>> import tempfile, torch
        >>> from simam import attach
        >>> net = attach(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), where="0")
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"state_dict": {"module.0.weight": torch.ones(2, 1, 3, 3)}}, file.name)
        ...     load_checkpoint(net, file.name)[0].weight.sum()
        tensor(18., grad_fn=<SumBackward0>)
    """
    check_module(model)
    network = _backbone(model)
    layers = {p: m for p, m in network.named_modules() if isinstance(m, SimAM)}
    if not layers:
        raise ValueError(
            f"this {type(network).__name__} has no SimAM; attach it first: "
            f"simam.attach(model, e_lambda={E_LAMBDA})"
        )
    content, own = read(path), network.state_dict()
    authors = is_authors(content)
    state = rename(content, own) if authors else content
    wrong = compare(state, own)
    if wrong:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}, which has {len(own)} tensors: "
            f"{wrong}. The model is unchanged; build the one that the file was saved from"
        )
    _check_places(path, content, own, layers)
    load_strictly(network, state, str(path))
    if authors:
        _set_e_lambda(model, layers.values())
    return model


def is_authors(keys: Collection[str]) -> bool:
    """Whether the names of tensors are those of the authors' networks."""
    return any(map(_STEP.match, keys))


def rename(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Give the tensors of the authors' networks the names that they have in a network.

    Args:
        state (dict of str to Tensor): an authors' state dict.
        own (collection of str): the network's names, of torchvision or timm.

    Returns:
        dict of str to Tensor: those of the backbone, if the file is a detector's, and without a
            classifier, if the network has none.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {k[len("backbone.") :]: t for k, t in state.items() if k.startswith("backbone.")}
    heads = _HEADS - {key.partition(".")[0] for key in own}
    renamed = {_name(key, own): tensor for key, tensor in state.items()}
    return {key: t for key, t in renamed.items() if key.partition(".")[0] not in heads}


def _backbone(model: nn.Module) -> nn.Module:
    """The network inside a model of torchvision that detects or segments, else the model."""
    backbone = getattr(model, "backbone", model)
    body = getattr(backbone, "body", backbone)
    return body if isinstance(body, nn.Module) else model


def _name(key: str, own: Collection[str]) -> str:
    """The name that a network gives to a tensor of the authors'."""
    if key in own:  # a network written as theirs
        return key
    for pattern, replacement in _TO_TORCHVISION:
        key = re.sub(pattern, replacement, key)
    if "conv_stem.weight" in own:
        module, _, tensor = key.rpartition(".")
        return f"{_TIMM_MOBILENETV2.get(module, module)}.{tensor}"
    return key


def _timm_mobilenetv2() -> dict[str, str]:
    """The modules of torchvision's MobileNetV2 by the names that timm gives them."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
    names |= {"features.18.0": "conv_head", "features.18.1": "bn2"}
    expanded = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2"}
    expanded |= {"2": "conv_pwl", "3": "bn3"}
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    blocks = [(s, b) for s, depth in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(depth)]
    for number, (stage, block) in enumerate(blocks, 1):
        for theirs, timm in (expanded if number > 1 else first).items():
            names[f"features.{number}.conv.{theirs}"] = f"blocks.{stage}.{block}.{timm}"
    return names


_TIMM_MOBILENETV2 = _timm_mobilenetv2()


def _check_places(
    path: str | os.PathLike[str],
    state: Collection[str],
    own: Collection[str],
    layers: Collection[str],
) -> None:
    """Refuse a network with SimAM at other places than the file's: it would compute otherwise."""
    steps = {match[1] for key in state if key not in own and (match := _STEP.match(key))}
    theirs = {_name(f"{step}.0.weight", own).removesuffix(".weight") for step in steps}
    ours = {layer.removesuffix(".simam") for layer in layers}
    if not steps:  # a file with the network's own names, which do not tell
        return
    wrong = {"without": sorted(theirs - ours), "with, but not there": sorted(ours - theirs)}
    problems = [f"{len(paths)} {what}: {first_few(paths)}" for what, paths in wrong.items() if paths]
    if problems:
        raise ValueError(
            f"{path} has SimAM after {len(theirs)} convolutions, this network after other ones: "
            f"{'; '.join(problems)}. Attach it without where= and exclude="
        )


def _set_e_lambda(model: nn.Module, layers: Collection[SimAM]) -> None:
    were = [layer.e_lambda for layer in layers if layer.e_lambda != E_LAMBDA]
    for layer in layers:
        layer.e_lambda = E_LAMBDA
    arguments = getattr(model, "_model_args", {})  # with which timm's save_for_hf saves a model
    if "e_lambda" in arguments:
        arguments["e_lambda"] = E_LAMBDA
    if were:
        warnings.warn(
            f"set e_lambda={E_LAMBDA} on {len(were)} SimAM layers, as in the network whose "
            f"weights these are; it was {', '.join(f'{was:g}' for was in sorted(set(were)))}",
            stacklevel=3,
        )
