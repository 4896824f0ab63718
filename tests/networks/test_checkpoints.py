"""`load_checkpoint`: which files load, and refusals that leave the model unchanged."""

import importlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import simam
from simam.checkpoints import is_authors, load_checkpoint, trained_e_lambda
from tests.helpers import authors_networks
from tests.helpers.authors_networks import (
    NETWORKS,
    CifarResNet,
    fill,
    filled,
    profiled,
    publish,
    publish_cifar,
    publish_detector,
)

timm = pytest.importorskip("timm", reason="builds the networks")
torchvision = pytest.importorskip("torchvision", reason="builds the networks")
importlib.import_module("simam.models")  # needs timm, so it is imported after the skip

TIMM_NAMES = {name: name for name in NETWORKS} | {"mobilenet_v2": "mobilenetv2_100"}
COUNT = ".num_batches_tracked"


class Published(NamedTuple):
    name: str
    file: Path
    network: Any
    logits: Tensor


def images() -> Tensor:
    return torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module", params=NETWORKS)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Published]:
    """A network in the authors' structure, its file, and its outputs."""
    name = request.param
    network = filled(name)
    file = publish(network, tmp_path_factory.mktemp("published") / "checkpoint.pth.tar")
    with torch.no_grad():
        yield Published(name, file, network, network.double()(images()))
    file.unlink()


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(filled("resnet18"), tmp_path_factory.mktemp("published") / "r18.pth")


def attached(name: str = "resnet18", e_lambda: float = 0.1, **options: Any) -> nn.Module:
    """A torchvision network with SimAM attached."""
    model = torchvision.models.get_model(name, weights=None, **options)
    return simam.attach(model.eval(), e_lambda=e_lambda)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval().double()(images())


def e_lambdas(model: nn.Module) -> set[float]:
    return {layer.e_lambda for layer in model.modules() if isinstance(layer, simam.SimAM)}


def saved(content: object, file: Path) -> Path:
    torch.save(content, file)
    return file


def refusal(model: nn.Module, file: str | Path) -> str:
    """The error message, after a check that the model is unchanged."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    values = e_lambdas(model)
    with pytest.raises(ValueError, match=" ") as caught:
        load_checkpoint(model, file)
    assert e_lambdas(model) == values
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    return str(caught.value)


def test_load_checkpoint_gives_authors_outputs_in_torchvision(published: Published) -> None:
    model = attached(published.name)
    assert load_checkpoint(model, published.file) is model
    torch.testing.assert_close(logits(model), published.logits)
    # Without SimAM, the same weights give other outputs.
    assert not torch.allclose(logits(simam.detach(model)), published.logits, rtol=0.01)


def test_load_checkpoint_gives_authors_outputs_in_timm(published: Published) -> None:
    model = simam.attach(timm.create_model(TIMM_NAMES[published.name]), e_lambda=0.1)
    load_checkpoint(model, str(published.file))
    torch.testing.assert_close(logits(model), published.logits)


def test_create_model_checkpoint_path_gives_authors_outputs(published: Published) -> None:
    model = timm.create_model(
        f"simam_{TIMM_NAMES[published.name]}", checkpoint_path=str(published.file)
    )
    torch.testing.assert_close(logits(model), published.logits)


def test_create_model_pretrained_file_gives_authors_outputs(published: Published) -> None:
    name, file = f"simam_{TIMM_NAMES[published.name]}", str(published.file)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": file})
    torch.testing.assert_close(logits(model), published.logits)


def detector() -> Any:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    simam.attach(model.backbone.body, e_lambda=0.1)
    return model


@pytest.fixture(scope="module")
def resnet50() -> Any:
    return filled("resnet50")


@pytest.fixture(scope="module", params=[publish_detector, None], ids=["detector", "classifier"])
def resnet50_file(
    request: pytest.FixtureRequest, resnet50: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("published") / "epoch_12.pth"
    yield request.param(resnet50, file) if request.param else publish(resnet50, file)
    file.unlink()


@torch.no_grad()
def test_load_checkpoint_fills_only_backbone_of_detector(
    resnet50: Any, resnet50_file: Path
) -> None:
    model = detector().eval()
    others = {k: t.clone() for k, t in model.state_dict().items() if ".body." not in k}
    assert load_checkpoint(model, resnet50_file) is model
    x = images().float()
    maps = list(model.backbone.body(x).values())
    assert len(maps) == 4
    for actual, expected in zip(maps, resnet50.features(x), strict=True):
        scale = expected.abs().max()  # the error of 50 layers in float32 is relative to it
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)
    state = model.state_dict()
    assert len(others) > 20
    assert all(torch.equal(state[key], tensor) for key, tensor in others.items())


def without_classifier() -> nn.Module:
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    return simam.attach(model, e_lambda=0.1)


def with_pyramid() -> nn.Module:
    builder = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    backbone = builder(backbone_name="resnet18", weights=None, trainable_layers=5)
    simam.attach(backbone.body, e_lambda=0.1)
    return backbone


@pytest.mark.parametrize(
    "build",
    [
        without_classifier,
        with_pyramid,
        lambda: timm.create_model("simam_resnet18", num_classes=0),
        lambda: timm.create_model("simam_resnet18", features_only=True),
    ],
)
@pytest.mark.parametrize("write", [publish_detector, publish])
def test_load_checkpoint_into_network_without_classifier(
    build: Callable[[], Any], write: Callable[[nn.Module, Path], Path], tmp_path: Path
) -> None:
    authors = filled("resnet18")
    model = load_checkpoint(build(), write(authors, tmp_path / "authors.pth"))
    state = getattr(model, "body", model).state_dict()
    expected = {key.replace("conv2.0.", "conv2."): t for key, t in authors.state_dict().items()}
    # The norms in a pyramid's backbone are frozen and have no batch counts.
    assert len(state) == (100 if hasattr(model, "fpn") else 120)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def test_load_checkpoint_refuses_backbone_file_for_classifier(tmp_path: Path) -> None:
    file = publish_detector(filled("resnet18"), tmp_path / "epoch_12.pth")
    assert refusal(attached(), file) == (
        f"{file} does not fit this ResNet, which has 122 tensors: 2 missing: fc.weight, fc.bias. "
        "The model is unchanged; build the network that the file was saved from"
    )


def test_load_checkpoint_sets_e_lambda_and_warns(resnet18_file: Path) -> None:
    model = attached(e_lambda=1e-4)
    model.layer1[0].conv2.simam.e_lambda = 0.1
    with pytest.warns(UserWarning, match="e_lambda") as caught:
        load_checkpoint(model, resnet18_file)
    assert [str(warning.message) for warning in caught] == [
        "set e_lambda=0.1 on 7 SimAM layers, because these weights were trained with it; "
        "it was 0.0001"
    ]
    assert caught[0].filename == __file__
    assert e_lambdas(model) == {0.1}


@pytest.mark.skipif(
    not hasattr(timm.models, "save_for_hf"), reason="this timm does not know local-dir:"
)
def test_load_checkpoint_e_lambda_survives_save_for_hf(resnet18_file: Path, tmp_path: Path) -> None:
    model = timm.create_model("simam_resnet18", e_lambda=0.5)
    with pytest.warns(UserWarning, match=r"it was 0\.5$"):
        load_checkpoint(model, resnet18_file)
    timm.models.save_for_hf(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert e_lambdas(again) == {0.1}
    assert torch.equal(logits(again), logits(model))


def test_load_checkpoint_keeps_e_lambda_for_other_files(tmp_path: Path) -> None:
    trained = attached(e_lambda=0.3)
    file = saved({"state_dict": trained.state_dict()}, tmp_path / "own.pth")
    model = load_checkpoint(attached(e_lambda=0.3), file)
    assert e_lambdas(model) == {0.3}
    assert torch.equal(logits(model), logits(trained))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_load_checkpoint_into_network_of_authors_structure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authors = filled(name)
    file = publish(authors, tmp_path / "authors.pth")
    monkeypatch.setattr(authors_networks, "Attention", simam.SimAM)
    model = filled(name)
    for tensor in model.parameters():
        tensor.data.zero_()
    with pytest.warns(UserWarning, match=r"^set e_lambda=0\.1 on"):
        load_checkpoint(model, file)
    torch.testing.assert_close(logits(model), logits(authors))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_load_checkpoint_accepts_file_without_batch_counts(name: str, tmp_path: Path) -> None:
    network = filled(name)
    content = torch.load(publish(network, tmp_path / "new.pth"), weights_only=True)
    state = {k: t for k, t in content["state_dict"].items() if not k.endswith(COUNT)}
    assert len(state) < len(content["state_dict"])
    file = saved(content | {"state_dict": state}, tmp_path / "old.pth")
    model = load_checkpoint(attached(name), file)
    counts = [tensor for key, tensor in model.state_dict().items() if key.endswith(COUNT)]
    assert counts
    assert not any(counts)
    torch.testing.assert_close(logits(model), logits(network))
    model = timm.create_model(f"simam_{TIMM_NAMES[name]}", checkpoint_path=str(file))
    torch.testing.assert_close(logits(model), logits(network))


def test_load_checkpoint_loads_batch_counts(resnet18_file: Path) -> None:
    model = load_checkpoint(attached(), resnet18_file)
    assert model.layer1[0].bn1.num_batches_tracked == 7


def test_load_checkpoint_refuses_model_without_simam(resnet18_file: Path) -> None:
    assert refusal(torchvision.models.resnet18(), resnet18_file) == (
        "this ResNet has no SimAM; attach it first: simam.attach(model, e_lambda=0.1)"
    )


def test_load_checkpoint_refuses_non_module(resnet18_file: Path) -> None:
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got str$"):
        load_checkpoint("resnet18", resnet18_file)  # type: ignore[type-var]


def test_load_checkpoint_refuses_other_placement(resnet18_file: Path) -> None:
    model = simam.attach(torchvision.models.resnet18(), where=["layer4.*.conv2", "layer1.0.conv1"])
    assert refusal(model, resnet18_file) == (
        f"{resnet18_file} has SimAM after 8 convolutions, but this network after others: "
        "6 with SimAM only in the file: layer1.0.conv2, layer1.1.conv2, layer2.0.conv2, and 3 "
        "more; 1 with SimAM only in the network: layer1.0.conv1. "
        "Attach SimAM without where= and exclude="
    )


def test_load_checkpoint_refuses_other_placement_in_timm_mobilenetv2(tmp_path: Path) -> None:
    file = publish(filled("mobilenet_v2"), tmp_path / "authors.pth")
    model = simam.attach(timm.create_model("mobilenetv2_100"), exclude="blocks.0.*")
    assert "after others: 1 with SimAM only in the file: blocks.0.0.conv_dw. " in refusal(
        model, file
    )


def test_load_checkpoint_refuses_file_of_other_depth(resnet18_file: Path) -> None:
    assert refusal(attached("resnet34"), resnet18_file) == (
        f"{resnet18_file} does not fit this ResNet, which has 218 tensors: 80 missing: "
        "layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias, and 77 more. The "
        "model is unchanged; build the network that the file was saved from"
    )


def test_load_checkpoint_lists_all_kinds_of_difference(resnet18_file: Path, tmp_path: Path) -> None:
    content = torch.load(resnet18_file, weights_only=True)
    state = content["state_dict"]
    state["module.layer1.0.se.weight"] = state.pop("module.bn1.bias")
    file = saved(content, tmp_path / "edited.pth")
    assert refusal(attached(num_classes=10), file) == (
        f"{file} does not fit this ResNet, which has 122 tensors: 1 missing: bn1.bias; "
        "1 unexpected: layer1.0.se.weight; 2 of another shape: fc.weight (expected 10x512, got "
        "1000x512), fc.bias (expected 10, got 1000). The model is unchanged; build the network "
        "that the file was saved from"
    )


def test_load_checkpoint_refuses_mobilenetv2_file_for_resnet(tmp_path: Path) -> None:
    message = refusal(attached(), publish(filled("mobilenet_v2"), tmp_path / "authors.pth"))
    assert (
        "102 missing: conv1.weight, bn1.weight, bn1.bias, and 99 more; 260 unexpected: feat"
        in message
    )


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0, 1, 2, 60, 4000, 0.5, -1])
def test_load_checkpoint_refuses_truncated_file(
    new_format: bool, kept: float, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    file = tmp_path / "checkpoint.pth.tar"
    content = {"state_dict": nn.DataParallel(network).state_dict(), "epoch": 100}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    message = refusal(simam.attach(network, where="0"), file)
    assert message.startswith(f"{file} is refused: ")
    assert message.endswith(
        ". The file is truncated, damaged, or holds no weights; expected one written by "
        "torch.save(model.state_dict(), ...) or a .safetensors file"
    )
    assert len(message) < 450


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Not found</html>", bytes(5000)])
def test_load_checkpoint_refuses_other_format(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth.tar"
    file.write_bytes(content)
    assert " is refused: " in refusal(attached(), file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "holds 'epoch' with a int"),
        ({"state_dict": {"a": "b"}}, "holds 'a' with a str"),
    ],
)
def test_load_checkpoint_refuses_file_without_state_dict(
    content: object, message: str, tmp_path: Path
) -> None:
    file = saved(content, tmp_path / "checkpoint.pth.tar")
    assert refusal(attached(), file) == (
        f"{file} {message}, expected a state dict (names to tensors), by itself or as "
        '"state_dict" or "model" of a dict'
    )


def test_load_checkpoint_refuses_empty_state_dict(tmp_path: Path) -> None:
    file = saved({"state_dict": {}}, tmp_path / "checkpoint.pth.tar")
    assert "122 tensors: 102 missing: conv1.weight" in refusal(attached(), file)


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("by_torch", [True, False])
def test_load_checkpoint_refuses_file_that_would_run_code(by_torch: bool, tmp_path: Path) -> None:
    file, trace = tmp_path / "checkpoint.pth.tar", tmp_path / "ran"
    content = {"state_dict": {"conv1.weight": torch.ones(2)}, "epoch": Payload(trace)}
    if by_torch:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    message = refusal(attached(), file)
    assert not trace.exists()
    assert message.startswith(f"{file} is refused: ")
    if by_torch:
        assert re.search(
            r"it asks for \w+\.mkdir\. A file that holds more than tensors could run code; "
            r"expected one written by torch\.save",
            message,
        )
        torch.load(file, weights_only=False)  # the payload does run without the protection
    else:
        pickle.loads(file.read_bytes())
    assert trace.exists()


def test_load_checkpoint_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file"):
        load_checkpoint(attached(), tmp_path / "missing.pth")


def test_load_checkpoint_reads_safetensors(resnet18_file: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="timm brings it")
    state = torch.load(resnet18_file, weights_only=True)["state_dict"]
    safetensors.save_file(state, tmp_path / "authors.safetensors")
    model = load_checkpoint(attached(), tmp_path / "authors.safetensors")
    assert torch.equal(logits(model), logits(load_checkpoint(attached(), resnet18_file)))


def test_load_checkpoint_names_extra_if_safetensors_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=re.escape('pip install "simam[timm]"')):
        load_checkpoint(attached(), "weights.safetensors")


def test_load_checkpoint_does_not_warn_if_e_lambda_matches(resnet18_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(attached(e_lambda=0.1), resnet18_file)


def cifar_network(e_lambda: float) -> Any:
    return simam.attach(CifarResNet(None).eval(), e_lambda=e_lambda)


def unknown(file: Path, kept: str) -> str:
    return (
        f"{file} does not tell the e_lambda that its weights were trained with; this network keeps "
        f"{kept}. The authors use 1e-4 on CIFAR and 0.1 on ImageNet and COCO"
    )


@pytest.mark.parametrize("e_lambda", [1e-4, 0.1])
def test_load_checkpoint_gives_authors_outputs_on_cifar(e_lambda: float, tmp_path: Path) -> None:
    authors = fill(CifarResNet(1e-4))
    file = publish_cifar(authors, tmp_path / "checkpoint.pth.tar")
    names = torch.load(file, weights_only=True)["state_dict"]
    assert "layer1.0.conv2.1.total_ops" in names
    model = cifar_network(e_lambda)
    with pytest.warns(UserWarning, match="e_lambda") as caught:
        load_checkpoint(model, file)
    assert [str(warning.message) for warning in caught] == [unknown(file, f"{e_lambda:g}")]
    assert caught[0].filename == __file__
    assert e_lambdas(model) == {e_lambda}
    expected = logits(authors)
    if e_lambda == 1e-4:
        torch.testing.assert_close(logits(model), expected)
    else:  # what was claimed of every file of the authors
        assert not torch.allclose(logits(model), expected, rtol=0.01)


@pytest.mark.parametrize("order", ["thop first", "DataParallel first"])
def test_load_checkpoint_skips_buffers_of_thop(order: str, tmp_path: Path) -> None:
    # The authors' script runs thop before DataParallel. Otherwise DataParallel has buffers, too.
    authors = filled("mobilenet_v2")
    expected, own = logits(authors), len(authors.state_dict())
    wrapped = nn.DataParallel(profiled(authors))
    state = (wrapped if order == "thop first" else profiled(wrapped)).state_dict()
    assert len(state) > own + 80
    assert ("total_ops" in state) == (order != "thop first")
    model = attached("mobilenet_v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(model, saved({"state_dict": state}, tmp_path / "thop.pth"))
    torch.testing.assert_close(logits(model), expected)


def meta(network: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return network().state_dict()


@pytest.mark.parametrize("name", NETWORKS)
def test_trained_e_lambda_of_published_classifiers(name: str) -> None:
    state = meta(NETWORKS[name])
    assert trained_e_lambda(state) == 0.1
    head = "classifier.0.weight" if name == "mobilenet_v2" else "fc.weight"
    assert trained_e_lambda(state | {head: state[head][:100]}) is None
    stem = "features.0.0.weight" if name == "mobilenet_v2" else "conv1.weight"
    assert trained_e_lambda(state | {stem: state[stem][..., :2, :2]}) is None


@pytest.mark.parametrize(
    "network",
    [
        lambda: authors_networks.ResNet(authors_networks.Bottleneck, (2, 2, 2, 2)),  # ResNet-26
        lambda: authors_networks.ResNet(authors_networks.Bottleneck, (3, 8, 36, 3)),  # ResNet-152
        lambda: authors_networks.ResNet(authors_networks.Bottleneck, (3, 4, 6, 3), width=128),
        lambda: CifarResNet(1e-4, depth=3),
        lambda: torchvision.models.video.r3d_18(),
        lambda: torchvision.models.resnet18(),  # the names of a network without SimAM
    ],
)
def test_trained_e_lambda_of_other_networks_is_unknown(network: Callable[[], nn.Module]) -> None:
    assert trained_e_lambda(meta(network)) is None


def test_trained_e_lambda_of_detectors() -> None:
    state = meta(NETWORKS["resnet50"])
    backbone = {f"backbone.{k}": t for k, t in state.items() if not k.startswith("fc.")}
    assert trained_e_lambda(backbone) is None
    assert trained_e_lambda(backbone | {"head.fc.weight": state["fc.weight"][:10]}) is None
    assert trained_e_lambda(backbone | {"rpn_head.rpn_conv.weight": torch.ones(1)}) == 0.1


def video_network() -> nn.Module:
    """A network whose own names are like the authors': a norm stands in the same Sequential."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2))
            self.conv2 = nn.Sequential(nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2))

    model = nn.Sequential()
    model.layer1 = nn.Sequential(Block())
    return simam.attach(model, where="layer1.0.conv2.0", e_lambda=1e-4)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_load_checkpoint_keeps_e_lambda_of_names_like_the_authors(
    with_metadata: bool, tmp_path: Path
) -> None:
    for builder in ("r3d_18", "mc3_18", "r2plus1d_18"):
        assert is_authors(meta(getattr(torchvision.models.video, builder)))
    model = video_network()
    assert is_authors(model.state_dict())
    # thop adds more names of this kind, which the network does not have.
    state = model.state_dict() | {"layer1.0.conv2.0.total_ops": torch.zeros(1)}
    file = saved(state if with_metadata else dict(state), tmp_path / "own.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_checkpoint(video_network(), file)
    assert e_lambdas(again) == {1e-4}


def test_load_checkpoint_uses_the_e_lambda_that_a_file_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network with the authors' structure and this library's layer.
    monkeypatch.setattr(authors_networks, "Attention", simam.SimAM)
    trained = fill(CifarResNet(0.05))
    file = publish_cifar(trained, tmp_path / "checkpoint.pth.tar")
    model = cifar_network(1e-4)
    with pytest.warns(UserWarning, match=r"^set e_lambda=0\.05 on 3 SimAM layers") as caught:
        load_checkpoint(model, file)
    assert len(caught) == 1
    torch.testing.assert_close(logits(model), logits(trained))


def differing(file: Path, differences: str) -> str:
    return (
        f"the weights in {file} were saved from a network with other SimAM layers, so outputs may "
        f"differ from those in its training: {differences}"
    )


@pytest.mark.parametrize(
    ("save", "differences"),
    [
        (
            lambda: CifarResNet(None),
            "3 only in this model: layer1.0.conv2.simam, layer2.0.conv2.simam, "
            "layer3.0.conv2.simam",
        ),
        (
            lambda: simam.attach(CifarResNet(None), where=["layer*.conv2", "conv1"], e_lambda=0.3),
            "1 only in the file: conv1.simam; 3 with other options: layer1.0.conv2.simam "
            "(e_lambda=0.3, statistics='shared' in the file, e_lambda=0.0001, statistics='shared' "
            "here), layer2.0.conv2.simam",
        ),
    ],
    ids=["plain", "others"],
)
def test_load_checkpoint_warns_once_if_a_file_records_other_layers(
    save: Callable[[], nn.Module], differences: str, tmp_path: Path
) -> None:
    trained = nn.DataParallel(save())
    file = saved({"state_dict": trained.state_dict()}, tmp_path / "own.pth")
    model = cifar_network(1e-4)
    with pytest.warns(UserWarning, match="other SimAM layers") as caught:
        load_checkpoint(model, file)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(differing(file, differences))
    assert caught[0].filename == __file__
    assert e_lambdas(model) == {1e-4}
    assert torch.equal(model.conv1.weight, trained.module.conv1.weight)


def test_load_checkpoint_does_not_know_the_layers_of_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="timm brings it")
    file = tmp_path / "own.safetensors"
    safetensors.save_file(CifarResNet(None).state_dict(), file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(cifar_network(1e-4), file)
