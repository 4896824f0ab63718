"""State dicts: comparing, and refusals that leave the model unchanged bit for bit."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simam
from simam.cli.models import load_weights
from simam.messages import UserError
from simam.state_dict import compare, load_strictly, unwrap, without_profile
from simam.weights_file import read

State = dict[str, Tensor]


class FrozenNorm(nn.Module):
    """A norm that never counts batches, and drops the count of a file, as torchvision's does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels))

    def _load_from_state_dict(self, state_dict: State, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Stubborn(nn.Module):
    """A module whose own loader changes the module, and then refuses in one of several ways."""

    def __init__(self, refusal: str) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(2))
        self.register_buffer("hidden", torch.rand(2), persistent=False)
        self.refusal, self.note = refusal, "as built"

    def _load_from_state_dict(
        self,
        state_dict: State,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        self.hidden.fill_(7)
        self.weight = nn.Parameter(torch.zeros(5))
        self.scale.data = torch.zeros(4)
        self.train(not self.training)
        self.note = "half loaded"
        self.register_buffer("late", torch.ones(1))
        match self.refusal:
            case "raises":
                raise KeyError("a tensor of an older version")
            case "reports an error":
                errors.append("the table is of another version")
            case "misses a name":
                missing.append(f"{prefix}table")
            case "is interrupted":
                raise KeyboardInterrupt


def network(middle: nn.Module | None = None) -> nn.Sequential:
    """Modules before and after one in the middle; -0.0 and nan are easy to miss when comparing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(2, 3, 1),
            norm=nn.BatchNorm2d(3),
            middle=middle or nn.Identity(),
            low=nn.Linear(3, 4).to(torch.bfloat16),
            last=nn.Linear(3, 4),
        )
    )
    with torch.no_grad():
        model.conv.weight.view(-1)[:3] = torch.tensor([-0.0, torch.nan, torch.inf])
        model.norm.num_batches_tracked.fill_(5)
    model.norm.eval()
    model.last.weight.requires_grad_(False)
    return model


def zeros_for(model: nn.Module) -> State:
    """A state dict that fits the model and is zero everywhere."""
    state = model.state_dict()
    for key, tensor in state.items():
        state[key] = torch.zeros_like(tensor)
    return state


def everything(model: nn.Module) -> list[Any]:
    """All that a refusal must keep: tensor identities, bytes and shapes, modes, attributes."""
    found: list[Any] = []
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        found.append((path, id(module), plain))
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in named:
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
            found.append((name, id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype))
            found.append((content, tensor.requires_grad))
    return found


def refusal(model: nn.Module, state: State) -> str:
    """The error message, after a check that the model and the state dict are unchanged."""
    before, names = everything(model), list(state)
    with pytest.raises(ValueError, match=r"^the weights in a file are not those of") as caught:
        load_strictly(model, state, "a file")
    assert everything(model) == before
    assert list(state) == names
    return str(caught.value).removeprefix("the weights in a file are not those of this model, ")


def test_load_strictly_oracle_sees_every_change() -> None:
    # `everything`, which the tests below compare, differs after each kind of change.
    changes: list[Callable[[Any], object]] = [
        lambda m: m.conv.weight.data.view(-1)[:1].zero_(),  # -0.0 becomes 0.0
        lambda m: m.norm.num_batches_tracked.add_(1),
        lambda m: m.middle.hidden.zero_(),
        lambda m: m.norm.train(),
        lambda m: setattr(m.middle, "note", "other"),
        lambda m: setattr(m.last, "bias", nn.Parameter(m.last.bias.detach())),
        lambda m: m.last.weight.requires_grad_(True),
        lambda m: m.last.register_buffer("late", torch.ones(1)),
    ]
    for change in changes:
        model = network(Stubborn("raises"))
        before = everything(model)
        assert everything(model) == before
        change(model)
        assert everything(model) != before


def without(state: State, *names: str) -> State:
    for name in names:
        del state[name]
    return state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: without(s, "last.bias"), "1 missing: last.bias"),
        (lambda s: {}, "10 missing: conv.weight, conv.bias, norm.weight, and 7 more"),
        (lambda s: s | {"head": torch.ones(1)}, "1 unexpected: head"),
        (
            lambda s: s | {"last.weight": torch.ones(4, 1), "norm.bias": torch.ones(())},
            "2 of another shape: norm.bias (expected 3, got scalar), "
            "last.weight (expected 4x3, got 4x1)",
        ),
        (
            lambda s: without(s | {"head": torch.ones(1), "low.bias": torch.ones(2)}, "last.bias"),
            "1 missing: last.bias; 1 unexpected: head; "
            "1 of another shape: low.bias (expected 4, got 2)",
        ),
    ],
    ids=["missing", "empty", "unexpected", "misshaped", "mixed"],
)
def test_load_strictly_refusal_changes_nothing(
    edit: Callable[[State], State], message: str
) -> None:
    model = network()
    state = edit(zeros_for(model))
    assert refusal(model, state) == f"which has 11 tensors; {message}"
    assert compare(state, model.state_dict()) == message


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "KeyError: 'a tensor of an older version'"),
        ("reports an error", "Sequential: the table is of another version"),
        ("misses a name", "1 missing: middle.table"),
    ],
)
def test_load_strictly_restores_model_after_refusal_of_a_module(kind: str, message: str) -> None:
    model = network(Stubborn(kind))
    copied: list[bool] = []
    # When the module in the middle refuses, the modules before it have been filled.
    model.middle.register_load_state_dict_pre_hook(
        lambda *_: copied.append(bool((model.conv.weight == 0).all()))
    )
    assert refusal(model, zeros_for(model)).endswith(message)
    assert copied == [True]


def test_load_strictly_restores_model_after_interrupt() -> None:
    model = network(Stubborn("is interrupted"))
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        load_strictly(model, zeros_for(model), "a file")
    assert everything(model) == before


def test_load_strictly_restores_tied_and_expanded_tensors() -> None:
    model = network()
    model.last.weight = model.low.weight = nn.Parameter(torch.rand(4, 3))
    model.register_buffer("expanded", torch.rand(1).expand(4))  # cannot be written by copy_
    message = refusal(model, zeros_for(model))
    assert "expanded" in message
    assert model.last.weight is model.low.weight


def special(name: str) -> Tensor:
    values = torch.rand(3)
    match name:
        case "quantised":
            return torch.quantize_per_tensor(values, 0.1, 0, torch.quint8)
        case "sparse":
            return values.to_sparse()
        case "conjugate":
            return torch.complex(values, values).conj()
    return values[::2]  # strided: its storage holds an element more


# torch warns about its own quantised tensors.
@pytest.mark.filterwarnings(r"ignore:torch\.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", ["quantised", "sparse", "conjugate", "strided"])
def test_load_strictly_restores_special_tensors(name: str) -> None:
    model, last = nn.Linear(2, 2), nn.Linear(2, 2)
    buffer = special(name)
    model.register_buffer("special", buffer)
    model.last = last
    expected = model.special.clone()
    state = model.state_dict()
    state |= {"special": special(name), "last.weight": torch.zeros(2, 2)}
    weight = last.weight.detach().clone()
    with pytest.raises(ValueError, match=r"1 missing: last\.bias"):
        load_strictly(model, without(state, "last.bias"), "a file")
    assert model.special is buffer
    assert torch.equal(*(t.to_dense() if t.is_sparse else t for t in (model.special, expected)))
    assert torch.equal(last.weight, weight)


def test_load_strictly_keeps_a_hook_that_removes_itself() -> None:
    model = network()
    called = []

    def hook(*args: object) -> None:
        called.append(args)
        handle.remove()

    handle = model.last.register_load_state_dict_pre_hook(hook)
    refusal(model, without(zeros_for(model), "conv.bias"))
    refusal(model, without(zeros_for(model), "conv.bias"))
    assert len(called) == 2
    handle.remove()
    load_strictly(model, zeros_for(model), "a file")
    assert len(called) == 2


def test_load_strictly_restores_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = network()
    refusal(model, zeros_for(network()))


def test_load_weights_refusal_changes_nothing(tmp_path: Path) -> None:
    model, file = network(), str(tmp_path / "file.pth")
    torch.save(without(zeros_for(model), "last.bias"), file)
    before = everything(model)
    with pytest.raises(UserError, match=r"which has 11 tensors; 1 missing: last\.bias\. Name"):
        load_weights(model, file)
    assert everything(model) == before


def test_load_strictly_fills_every_tensor() -> None:
    model = network(FrozenNorm(3))
    state = zeros_for(model)
    load_strictly(model, state, "a file")
    assert not any(tensor.any() for tensor in model.state_dict().values())
    assert model.training
    assert not model.norm.training


def test_load_strictly_accepts_file_without_batch_counts() -> None:
    model = network()
    state = without(zeros_for(model), "norm.num_batches_tracked")
    assert state._metadata["norm"]["version"] == 2  # type: ignore[attr-defined]
    for old in (state, dict(state)):
        model = network()
        assert compare(old, model.state_dict()) == ""
        load_strictly(model, old, "a file")
        assert not model.norm.running_mean.any()
        assert not model.last.weight.any()
        assert model.norm.num_batches_tracked in (0, 5)  # depends on the version of torch


def test_load_strictly_accepts_batch_counts_for_norms_that_keep_none() -> None:
    counted = network(nn.BatchNorm2d(3))
    for norm in (FrozenNorm(3), nn.GroupNorm(1, 3)):
        state = zeros_for(counted)
        if isinstance(norm, nn.GroupNorm):
            state = without(state, "middle.running_mean", "middle.running_var")
        model = network(norm)
        assert compare(state, model.state_dict()) == ""
        load_strictly(model, state, "a file")
        assert not model.middle.weight.any()


class Versioned(nn.Linear):
    """A module whose tensor was called kernel in version 1."""

    _version = 2

    def _load_from_state_dict(self, state: State, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") == 1:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_strictly_lets_modules_migrate_by_version(prefix: str, tmp_path: Path) -> None:
    old = nn.Sequential(Versioned(2, 2)).state_dict()
    old["0.kernel"] = old.pop("0.weight")
    old._metadata["0"]["version"] = 1  # type: ignore[attr-defined]
    if prefix:
        wrapped = nn.DataParallel(nn.Sequential(Versioned(2, 2))).state_dict()
        wrapped._metadata["module.0"]["version"] = 1  # type: ignore[attr-defined]
        wrapped.clear()
        wrapped.update({f"module.{key}": tensor for key, tensor in old.items()})
        saved = wrapped
    else:
        saved = old
    torch.save({"state_dict": saved}, tmp_path / "old.pth")
    model = nn.Sequential(Versioned(2, 2))
    state = read(tmp_path / "old.pth")
    load_strictly(model, state, "a file")
    assert torch.equal(model[0].weight, old["0.kernel"])
    # Without the version the name is unknown, and nothing changes.
    assert "1 missing: 0.weight; 1 unexpected: 0.kernel" in refusal(model, dict(state))


def test_load_strictly_keeps_extra_state_that_is_no_tensor() -> None:
    class Extra(nn.Module):
        note: Any = "as built"

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    model = network(Extra())
    state = zeros_for(network()) | {"middle._extra_state": torch.ones(2)}
    refusal(model, without(state, "last.bias"))
    assert model.middle.note == "as built"


def test_load_strictly_gives_no_warning() -> None:
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(model, zeros_for(model), "a file")


@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_state_dict_read_keeps_version_metadata(key: str | None, tmp_path: Path) -> None:
    for model, name in ((network(), ""), (nn.DataParallel(network()), "module.")):
        state = model.state_dict()
        torch.save({key: state, "epoch": 3} if key else state, tmp_path / "file.pth")
        found = read(tmp_path / "file.pth")
        assert list(found) == [key.removeprefix(name) for key in state]
        torch.testing.assert_close(
            list(found.values()), list(state.values()), rtol=0, atol=0, equal_nan=True
        )
        metadata = network().state_dict()._metadata  # type: ignore[attr-defined]
        assert dict(found._metadata) == dict(metadata)  # type: ignore[attr-defined]


def test_state_dict_unwrap_does_not_change_the_content() -> None:
    state = nn.DataParallel(network()).state_dict()
    names, versions = list(state), dict(state._metadata)
    assert list(unwrap({"state_dict": state})) == list(network().state_dict())
    assert list(state) == names
    assert dict(state._metadata) == versions


@pytest.mark.parametrize("content", [[1], None, {"epoch": 3}, {"state_dict": 3}, {}])
def test_state_dict_unwrap_returns_other_content(content: object) -> None:
    assert unwrap(content) is content


def test_state_dict_unwrap_keeps_a_prefix_that_some_names_lack() -> None:
    state = {"module.weight": torch.ones(1), "weight": torch.ones(1)}
    assert unwrap(state) is state


def test_state_dict_compare_is_empty_if_all_fits() -> None:
    own = network().state_dict()
    assert compare(zeros_for(network()), own) == ""


PROFILE = {"total_ops": torch.zeros(1), "norm.total_params": torch.zeros(1)}


def test_load_strictly_skips_buffers_of_thop() -> None:
    model = network()
    state = zeros_for(model) | PROFILE
    assert compare(state, model.state_dict()) == ""
    load_strictly(model, state, "a file")
    assert not model.last.weight.any()
    assert set(PROFILE) <= set(state)


def test_load_strictly_loads_buffers_of_thop_that_the_model_has() -> None:
    model = network()
    model.norm.register_buffer("total_params", torch.zeros(1))
    state = zeros_for(model) | {"norm.total_params": torch.ones(1)}
    load_strictly(model, state, "a file")
    assert model.norm.total_params == 1
    del state["norm.total_params"]
    assert refusal(model, state) == "which has 12 tensors; 1 missing: norm.total_params"


def test_load_strictly_refuses_names_that_are_almost_those_of_thop() -> None:
    model = network()
    for name in ("total_ops.weight", "norm.my_total_ops", "Total_ops"):
        message = f"1 unexpected: {name}"
        assert message in refusal(model, zeros_for(model) | {name: torch.zeros(1)})


def test_state_dict_without_profile_keeps_version_metadata() -> None:
    state = network().state_dict()
    state["total_ops"] = torch.zeros(1)
    kept = without_profile(state, own=())
    assert "total_ops" in state
    assert list(kept) == list(network().state_dict())
    assert kept._metadata["norm"]["version"] == 2  # type: ignore[attr-defined]


def test_state_dict_unwrap_drops_prefix_beside_buffers_of_thop() -> None:
    state = {"total_ops": torch.zeros(1), "module.weight": torch.ones(1)}
    assert list(unwrap(state)) == ["total_ops", "weight"]
    profile = {"total_ops": torch.zeros(1)}
    assert unwrap(profile) is profile


@pytest.mark.parametrize("metadata", [None, [1], {"norm": 3}, {1: {}}])
def test_state_dict_metadata_of_another_form_is_ignored(metadata: object, tmp_path: Path) -> None:
    model = network()
    state = zeros_for(model)
    state._metadata = metadata  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "file.pth")
    load_strictly(model, read(tmp_path / "file.pth"), "a file")
    assert not model.last.weight.any()


def attached(*paths: str, e_lambda: float = 1e-4, **options: str) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    return simam.attach(model, where=paths, e_lambda=e_lambda, **options) if paths else model


OTHER_LAYERS = (
    "the weights in a file were saved from a network with other SimAM layers, so outputs may "
    "differ from those in its training: "
)


@pytest.mark.parametrize(
    ("saved", "model", "differences"),
    [
        (attached("0"), attached(), "1 only in the file: 0.simam"),
        (attached(), attached("0", "1"), "2 only in this model: 0.simam, 1.simam"),
        (
            attached("0", "1"),
            attached("1", "2"),
            "1 only in the file: 0.simam; 1 only in this model: 2.simam",
        ),
        (
            attached("0", "1", e_lambda=0.1),
            attached("0", "1", e_lambda=0.1, statistics="leave_one_out"),
            "2 with other options: 0.simam (e_lambda=0.1, statistics='shared' in the file, "
            "e_lambda=0.1, statistics='leave_one_out' here), 1.simam (e_lambda=0.1, "
            "statistics='shared' in the file, e_lambda=0.1, statistics='leave_one_out' here)",
        ),
    ],
    ids=["only in the file", "only in the model", "moved", "options"],
)
def test_load_strictly_warns_once_of_other_layers(
    saved: nn.Module, model: nn.Module, differences: str
) -> None:
    state = saved.state_dict()
    with pytest.warns(UserWarning, match="SimAM") as caught:
        load_strictly(model, state, "a file")
    assert [str(warning.message) for warning in caught] == [OTHER_LAYERS + differences]
    assert torch.equal(model[0].weight, saved[0].weight)
    assert state._metadata == saved.state_dict()._metadata  # type: ignore[attr-defined]


def renamed_back(state: Any) -> Any:
    """As FSDP does: the names of the tensors lose a wrapper's, and the metadata does not."""
    wrapped = OrderedDict(state)
    metadata = {f"_fsdp_wrapped_module.{path}": each for path, each in state._metadata.items()}
    wrapped._metadata = metadata  # type: ignore[attr-defined]
    return wrapped


@pytest.mark.parametrize(
    "edit",
    [dict, lambda state: OrderedDict(dict(state)), renamed_back],
    ids=["dict", "OrderedDict", "wrapped"],
)
def test_load_strictly_is_silent_without_metadata_of_the_tensors(
    edit: Callable[[Any], State],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(attached("0"), edit(attached("1").state_dict()), "a file")


def test_load_strictly_is_silent_about_the_same_layers() -> None:
    state = attached("0", "1", e_lambda=0.1).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(attached("0", "1", e_lambda=0.1), state, "a file")
        # As an older version of this library saved it.
        for path in ("0.simam", "1.simam"):
            state._metadata[path] = {"version": 1}  # type: ignore[attr-defined]
        load_strictly(attached("0", "1", e_lambda=0.1), state, "a file")
    with pytest.warns(UserWarning, match=r"1 only in the file: 1\.simam$"):
        load_strictly(attached("0", e_lambda=0.1), state, "a file")


def test_load_strictly_knows_the_layers_of_an_older_version_by_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), simam.SimAM())
    state = model.state_dict()
    state._metadata["1"] = {"version": 1}  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strictly(model, state, "a file")


def test_load_strictly_restores_model_if_warnings_are_errors() -> None:
    # As they are in these tests.
    model = attached("0")
    before = everything(model)
    with pytest.raises(UserWarning, match="SimAM"):
        load_strictly(model, attached().state_dict(), "a file")
    assert everything(model) == before
