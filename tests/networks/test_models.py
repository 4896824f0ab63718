"""Models in timm's registry: names, arguments and weights work as for timm's own models."""

import copy
import importlib
import io
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from tests.helpers.authors_networks import filled, publish
from tests.helpers.by_hand import ByHand, blocks

timm = pytest.importorskip("timm", reason="registers and builds the models")
models = importlib.import_module("simam.models")

R18, R34 = (2, 2, 2, 2), (3, 4, 6, 3)


def resnet(depths: tuple[int, ...]) -> list[str]:
    return blocks("layer{stage}.{block}.conv2", depths, 1)


# The hosts of SimAM: the 3x3 or depthwise convolution of every block.
HOSTS = {
    "simam_resnet18": resnet(R18),
    "simam_resnet34": resnet(R34),
    "simam_resnet50": resnet(R34),
    "simam_resnet101": resnet((3, 4, 23, 3)),
    "simam_resnet152": resnet((3, 8, 36, 3)),
    "simam_resnet50d": resnet(R34),
    "simam_resnext50_32x4d": resnet(R34),
    "simam_mobilenetv2_100": blocks("blocks.{stage}.{block}.conv_dw", (1, 2, 3, 4, 3, 3, 1)),
    "simam_efficientnet_b0": blocks("blocks.{stage}.{block}.conv_dw", (1, 2, 2, 3, 3, 4, 1)),
    "simam_convnext_tiny": blocks("stages.{stage}.blocks.{block}.conv_dw", (3, 3, 9, 3)),
    "simam_regnety_008": [
        f"s{stage}.b{block}.conv2.conv"
        for stage, depth in enumerate((1, 3, 8, 2), 1)
        for block in range(1, depth + 1)
    ],
}
# One small network of each family.
FAMILIES = ["simam_resnet18", "simam_mobilenetv2_100", "simam_convnext_tiny", "simam_regnety_008"]


def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(1)).double()


@torch.no_grad()
def output(model: nn.Module, channels: int = 3) -> Any:
    return model.double().eval()(images(channels))


def layers(model: nn.Module) -> dict[str, simam.SimAM]:
    found = {path: m for path, m in model.named_modules() if isinstance(m, simam.SimAM)}
    return {path.removesuffix(".simam"): layer for path, layer in found.items()}


def e_lambdas(model: nn.Module) -> set[float]:
    return {layer.e_lambda for layer in layers(model).values()}


def shuffled(model: nn.Module) -> nn.Module:
    """Make the norms random: timm sets some weights to 0, which would hide the layers before."""
    for key, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            own = re.sub(r"^(body|graph_module|model)\.", "", key)  # inside timm's wrappers
            seed = zlib.crc32(own.encode())
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def without_values(name: str) -> nn.Module:
    # timm 1.0's ConvNeXt reads values of tensors while it is built.
    with torch.device("cpu" if "convnext" in name else "meta"):
        return timm.create_model(name)


needs_save_for_hf = pytest.mark.skipif(
    not hasattr(timm.models, "save_for_hf"), reason="this timm has no local-dir: models"
)


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a ResNet-18 as the authors publish it."""
    return publish(filled("resnet18"), tmp_path_factory.mktemp("published") / "r18.pth.tar")


@pytest.fixture(scope="module")
def authors_logits() -> Tensor:
    return output(filled("resnet18"))


def test_list_models_names() -> None:
    assert timm.list_models("simam_*") == sorted(HOSTS, key=timm_order)
    assert timm.list_models("simam_*", pretrained=True) == []
    assert set(HOSTS) <= set(models.__all__)


def timm_order(name: str) -> list[object]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_list_models_group_is_not_one_of_timm() -> None:
    # timm keeps a group for each module that registers a model. A group of timm's own with this
    # name would hold models of timm beside these.
    assert {"resnet", "models"} <= set(timm.list_modules())
    assert timm.list_models(module="models") == timm.list_models("simam_*")


@pytest.mark.parametrize("name", HOSTS)
def test_create_model_placement(name: str) -> None:
    model = without_values(name)
    assert sorted(layers(model)) == sorted(HOSTS[name])
    assert e_lambdas(model) == {0.1}


@pytest.mark.parametrize("name", FAMILIES)
def test_create_model_placement_equals_plan(name: str) -> None:
    plan = simam.plan(timm.create_model(name.removeprefix("simam_")))
    assert [insertion.path for insertion in plan] == HOSTS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_create_model_outputs_match_simam_by_hand(name: str) -> None:
    model = shuffled(timm.create_model(name, num_classes=7, e_lambda=0.03))
    reference = timm.create_model(name.removeprefix("simam_"), num_classes=7)
    reference.load_state_dict(model.state_dict())
    plain = output(reference)
    for path in HOSTS[name]:
        parent, _, child = path.rpartition(".")
        block = reference.get_submodule(parent)
        setattr(block, child, ByHand(getattr(block, child), 0.03))
    actual = output(model)
    assert actual.shape == (2, 7)
    torch.testing.assert_close(actual, output(reference))
    assert not torch.allclose(actual, plain, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "host"), [("norm", "blocks.6.0.bn2"), ("branch", "blocks.6.0.bn3")]
)
@pytest.mark.parametrize("features_only", [False, True])
def test_create_model_place(place: str, host: str, features_only: bool) -> None:
    options = {"place": place, "features_only": features_only}
    layers = simam.attached(timm.create_model("simam_mobilenetv2_100", **options))
    assert len(layers) == 17
    assert [*layers][-1] == host


def test_create_model_refuses_a_place_without_host() -> None:
    with pytest.raises(ValueError, match="with a host for place='branch'"):
        timm.create_model("simam_convnext_tiny", place="branch")
    with pytest.raises(ValueError, match=r"^place must be one of"):
        timm.create_model("simam_resnet18", place="end")


@pytest.mark.parametrize("route", ["checkpoint_path", "pretrained"])
def test_create_model_at_another_place_refuses_authors_weights(
    route: str, authors_file: Path
) -> None:
    options: dict[str, object] = {"checkpoint_path": str(authors_file)}
    if route == "pretrained":
        overlay = {"file": str(authors_file)}
        options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    with pytest.raises(ValueError, match="but this network has it elsewhere"):
        timm.create_model("simam_resnet18", place="branch", **options)


def test_create_model_e_lambda() -> None:
    assert e_lambdas(timm.create_model("simam_resnet18", e_lambda=1e-4)) == {1e-4}
    with pytest.raises(ValueError, match=r"e_lambda must be .*0"):
        timm.create_model("simam_resnet18", e_lambda=0.0)
    with pytest.raises(TypeError, match=r"got the integer 1, .* write e_lambda=1\.0$"):
        timm.create_model("simam_resnet18", e_lambda=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_create_model_features_only(name: str) -> None:
    model = shuffled(timm.create_model(name))
    features = timm.create_model(name, features_only=True)
    state = model.state_dict()
    if name == "simam_convnext_tiny":  # timm takes its stages out of their Sequential
        state = {re.sub(r"^(stem|stages)\.", r"\1_", key): t for key, t in state.items()}
    assert not features.load_state_dict(state, strict=False).missing_keys
    assert len(layers(features)) == len(HOSTS[name])
    maps = output(features)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()

    seen: list[Tensor] = []
    for path in features.feature_info.module_name():
        model.get_submodule(path).register_forward_hook(lambda _, __, y: seen.append(y))
    output(model)
    assert len(maps) == len(seen)
    for actual, expected in zip(maps, seen, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["hook", "fx", "getter", "dict"])
def test_create_model_features_only_every_feature_class(kind: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("simam_resnet18", features_only=True)
    torch.manual_seed(0)
    other = timm.create_model("simam_resnet18", features_only=True, feature_cls=kind)
    expected, actual = output(shuffled(model)), output(shuffled(other))
    actual = list(actual.values()) if isinstance(actual, dict) else actual
    assert len(actual) == len(expected) == 5
    for one, another in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, another)


def test_create_model_features_only_first_stages() -> None:
    model = timm.create_model("simam_resnet18", features_only=True, out_indices=(0, 1))
    assert list(layers(model)) == ["layer1.0.conv2", "layer1.1.conv2"]
    stem = timm.create_model("simam_resnet18", features_only=True, out_indices=(0,))
    assert not layers(stem)
    assert [m.shape for m in output(stem)] == [(2, 64, 32, 32)]


def test_create_model_channels_and_classes() -> None:
    model = timm.create_model("simam_mobilenetv2_100", in_chans=5, num_classes=4)
    assert output(model, channels=5).shape == (2, 4)
    assert model.num_classes == 4
    model.reset_classifier(6)
    assert output(model, channels=5).shape == (2, 6)
    assert output(timm.create_model("simam_resnet18", num_classes=0)).shape == (2, 512)


def test_create_model_checkpoint_path_with_own_weights(tmp_path: Path) -> None:
    model = shuffled(timm.create_model("simam_resnet18", num_classes=5))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "own.pth.tar")
    again = timm.create_model(
        "simam_resnet18", num_classes=5, checkpoint_path=str(tmp_path / "own.pth.tar")
    )
    assert torch.equal(output(again), output(model))


def test_create_model_checkpoint_path_with_plain_timm_weights(tmp_path: Path) -> None:
    plain = shuffled(timm.create_model("resnet18"))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model = timm.create_model("simam_resnet18", checkpoint_path=str(tmp_path / "plain.pth"))
    assert torch.equal(output(model), output(simam.attach(plain, e_lambda=0.1)))


def test_create_model_checkpoint_path_refuses_other_depth(authors_file: Path) -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.2\.conv1\.weight"):
        timm.create_model("simam_resnet34", checkpoint_path=str(authors_file))


def file_of(path: Path) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def created_then_loaded(file: Path, **arguments: Any) -> nn.Module:
    model = timm.create_model("simam_resnet18", **arguments)
    timm.models.load_checkpoint(model, str(file))
    return model


ROUTES: dict[str, Callable[..., nn.Module]] = {
    "checkpoint_path": lambda file, **arguments: timm.create_model(
        "simam_resnet18", checkpoint_path=str(file), **arguments
    ),
    "pretrained": lambda file, **arguments: timm.create_model(
        "simam_resnet18", **file_of(file), **arguments
    ),
    "load_checkpoint": created_then_loaded,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 0}, {"features_only": True}])
def test_create_model_loads_authors_weights(
    route: str, arguments: dict[str, Any], authors_file: Path, authors_logits: Tensor
) -> None:
    actual = output(ROUTES[route](authors_file, **arguments))
    if "features_only" in arguments:
        actual = actual[-1].mean((2, 3))
    if arguments:
        actual = filled("resnet18").fc.double()(actual).detach()
    torch.testing.assert_close(actual, authors_logits)


def test_create_model_loads_authors_weights_as_downloaded(
    authors_file: Path, authors_logits: Tensor
) -> None:
    # timm unwraps the state dict of a file, but not of a download.
    content = torch.load(authors_file, weights_only=True)
    model = timm.create_model(
        "simam_resnet18", pretrained=True, pretrained_cfg_overlay={"state_dict": content}
    )
    torch.testing.assert_close(output(model), authors_logits)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_create_model_loads_authors_weights_for_other_channels_and_classes(
    name: str, tmp_path: Path
) -> None:
    network = filled(name)
    file = publish(network, tmp_path / "authors_file.pth.tar")
    ours = {"resnet18": "simam_resnet18", "mobilenet_v2": "simam_mobilenetv2_100"}[name]
    model = timm.create_model(ours, in_chans=1, num_classes=10, **file_of(file))
    stem = network.conv1 if name == "resnet18" else network.features[0][0]
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    torch.testing.assert_close(first.weight, stem.weight.sum(1, keepdim=True))
    # One grey channel stands for three equal channels: equal features, up to rounding in the sum.
    grey = images(1)
    with torch.no_grad():
        expected = network.double().features(grey.expand(-1, 3, -1, -1))
        expected = expected[-1] if name == "resnet18" else expected
        actual = model.double().eval().forward_features(grey)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.std()))
        assert model(grey).shape == (2, 10)


@pytest.mark.parametrize("route", ROUTES)
def test_create_model_keeps_other_e_lambda_and_warns(route: str, authors_file: Path) -> None:
    message = (
        "these weights were trained with e_lambda=0.1, but this network was built with 0.0001; "
        "pass e_lambda=0.1 for the value of the weights"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        model = ROUTES[route](authors_file, e_lambda=1e-4)
    assert e_lambdas(model) == {1e-4}


def file_of_zeros(name: str, file: Path, *, layout: str = "own") -> Path:
    """A small file with zeros for every tensor of a network, and the buffers that thop leaves."""
    state = {k: torch.zeros((), dtype=t.dtype).expand(t.shape) for k, t in own_state(name).items()}
    profile = {"total_ops": torch.zeros(1), "any.module.total_params": torch.zeros(1)}
    if layout == "authors":
        state = {re.sub(r"(conv2)\.(?=weight)", r"\1.0.", key): t for key, t in state.items()}
        profile["layer1.0.conv2.1.total_ops"] = torch.zeros(1)
    torch.save({"state_dict": state | profile, "epoch": 3}, file)
    return file


def own_state(name: str) -> dict[str, Tensor]:
    return without_values(name).state_dict()


@pytest.mark.parametrize(
    ("name", "route"),
    [
        ("regnety_008", "checkpoint_path"),
        ("regnety_008", "pretrained"),  # timm has a filter of its own, as for ConvNeXt
        ("efficientnet_b0", "pretrained"),
    ],
)
def test_create_model_skips_buffers_of_thop(name: str, route: str, tmp_path: Path) -> None:
    file = file_of_zeros(f"simam_{name}", tmp_path / "own.pth")
    arguments = {"checkpoint_path": str(file)} if route == "checkpoint_path" else file_of(file)
    model = timm.create_model(f"simam_{name}", **arguments)
    assert not any(tensor.any() for tensor in model.state_dict().values())
    assert "state_dict" not in model.pretrained_cfg


@pytest.mark.parametrize("name", ["resnet50d", "resnet152"])
@pytest.mark.parametrize("route", ["load_state_dict", "pretrained"])
def test_create_model_translates_authors_layout_of_every_name(
    name: str, route: str, tmp_path: Path
) -> None:
    name = f"simam_{name}"
    file = file_of_zeros(name, tmp_path / "authors.pth", layout="authors")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert "layer1.0.conv2.0.weight" in state
    message = (
        "the file does not tell the e_lambda that its weights were trained with; this network "
        "keeps 0.1. The authors use 1e-4 on CIFAR and 0.1 on ImageNet and COCO"
    )
    with torch.device("meta"):
        if route == "pretrained":
            overlay = {"state_dict": {key: tensor.to("meta") for key, tensor in state.items()}}
            with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
                model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        else:
            model = timm.create_model(name)
            with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
                model.load_state_dict(state, assign=True)
            assert not model.layer1[0].conv2.weight.any()
    assert e_lambdas(model) == {0.1}


@pytest.mark.parametrize("route", ROUTES)
def test_create_model_loads_authors_weights_with_buffers_of_thop(
    route: str, authors_file: Path, authors_logits: Tensor, tmp_path: Path
) -> None:
    content = torch.load(authors_file, weights_only=True)
    for module in ("", "layer1.0.conv2.", "layer1.0.conv2.1."):
        content["state_dict"][f"module.{module}total_ops"] = torch.zeros(1)
    torch.save(content, tmp_path / "thop.pth")
    torch.testing.assert_close(output(ROUTES[route](tmp_path / "thop.pth")), authors_logits)


def test_load_state_dict_of_DataParallel_takes_own_and_authors_weights(
    authors_file: Path, authors_logits: Tensor
) -> None:
    model = shuffled(timm.create_model("simam_resnet18"))
    parallel = nn.DataParallel(timm.create_model("simam_resnet18"))
    parallel.load_state_dict(nn.DataParallel(model).state_dict())
    assert torch.equal(output(parallel.module), output(model))
    parallel.load_state_dict(torch.load(authors_file, weights_only=True)["state_dict"])
    torch.testing.assert_close(output(parallel.module), authors_logits)


def test_load_state_dict_keeps_its_strictness(authors_file: Path) -> None:
    model = timm.create_model("simam_resnet18")
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"total_ops_2"'):
        model.load_state_dict(state | {"total_ops_2": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1\.weight"):
        model.load_state_dict({f"module.{key}": tensor for key, tensor in state.items()})


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file])
def test_load_state_dict_of_copies_takes_authors_weights(
    duplicate: Callable[[nn.Module], nn.Module], authors_file: Path, authors_logits: Tensor
) -> None:
    model = duplicate(timm.create_model("simam_resnet18"))
    model.load_state_dict(timm.models.load_state_dict(str(authors_file)))
    torch.testing.assert_close(output(model), authors_logits)


def test_load_state_dict_of_enclosing_network() -> None:
    model = shuffled(timm.create_model("simam_resnet18"))
    outer, other = nn.Sequential(model), nn.Sequential(timm.create_model("simam_resnet18"))
    other.load_state_dict(outer.state_dict())
    assert torch.equal(output(other), output(outer))


@pytest.mark.filterwarnings(
    "ignore:torch.utils.checkpoint:UserWarning"
)  # timm 1.0 omits an argument
def test_create_model_gradient_checkpointing() -> None:
    model = shuffled(timm.create_model("simam_resnet18", num_classes=3)).double().train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model.zero_grad()
        y = model(images())
        y.backward(torch.arange(6).reshape(2, 3).double())
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@needs_save_for_hf
@pytest.mark.parametrize("safe", [False, True])
def test_save_for_hf_round_trip(safe: bool, tmp_path: Path) -> None:
    model = shuffled(
        timm.create_model("simam_mobilenetv2_100", num_classes=5, in_chans=4, e_lambda=0.02)
    )
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=safe)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert again.pretrained_cfg["architecture"] == "simam_mobilenetv2_100"
    assert e_lambdas(again) == {0.02}
    assert torch.equal(output(again, channels=4), output(model, channels=4))


@needs_save_for_hf
def test_save_for_hf_round_trip_of_authors_weights(
    authors_file: Path, authors_logits: Tensor, tmp_path: Path
) -> None:
    model = timm.create_model("simam_resnet18", **file_of(authors_file))
    timm.models.save_for_hf(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    torch.testing.assert_close(output(again), authors_logits)


@pytest.mark.parametrize("base", ["resnet18", "convnext_tiny"])
def test_create_model_pretrained_without_file(base: str) -> None:
    message = (
        f"there are no weights to download for simam_{base}; give a file: pretrained=True, "
        "pretrained_cfg_overlay=dict(file=...), or start from the weights of the network without "
        f"SimAM: simam.attach(timm.create_model('{base}', pretrained=True), e_lambda=0.1), which "
        "needs fine-tuning"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        timm.create_model(f"simam_{base}", pretrained=True)


@pytest.mark.parametrize("name", HOSTS)
def test_create_model_pretrained_cfg(name: str) -> None:
    model = without_values(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"] == 1000


def test_create_model_image_transforms_are_those_of_the_authors() -> None:
    data = timm.data.resolve_model_data_config(timm.create_model("simam_resnet18"))
    assert data["input_size"] == (3, 224, 224)
    assert data["interpolation"] == "bilinear"
    assert data["crop_pct"] == 224 / 256
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)


def test_import_names_extra_if_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "simam.models")
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=re.escape('pip install "simam[timm]"')):
        importlib.import_module("simam.models")


def test_launcher_of_docs_runs_script_of_timm(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "timm.md").read_text()
    launcher = re.search(r"```python\n(# with_simam\.py\n.*?)```", page, re.DOTALL)
    assert launcher is not None
    (tmp_path / "with_simam.py").write_text(launcher[1])
    script = "import sys, timm\nif __name__ == '__main__':\n    "
    script += "print(sys.argv, timm.is_model('simam_resnet18'))\n"
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "with_simam.py", "train.py", "--model", "simam_resnet18"]
    environment = os.environ | {"PYTHONPATH": str(Path(simam.__file__).parents[1])}
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.stdout == "['train.py', '--model', 'simam_resnet18'] True\n"
