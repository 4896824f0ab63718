"""Batch-norm statistics after recalibrate, against averages computed by hand, layer by layer."""

import copy
import importlib
import io
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from simam import attach, detach
from simam.recalibrate import recalibrate
from tests.helpers.by_hand import ByHand
from tests.helpers.processes import leave
from tests.helpers.tiny_blocks import snapshot

E_LAMBDA = 0.1


def tensors(*sizes: int, seed: int = 1) -> list[Tensor]:
    """Batches of the given sizes, each with a different mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, 3, 6, 6) for size in sizes]
    return [
        i + (i + 1) * torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, shape in enumerate(shapes)
    ]


def network(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(20, 2),
    ).double()
    for norm in (layers[1], layers[5]):  # neither initial statistics nor an affine identity
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2.0)
    return attach(layers, where="[04]", e_lambda=E_LAMBDA)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key}


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and unbiased variance of each channel of a batch, and the normalised batch."""
    means, variances, maps = [], [], []
    for channel in x.unbind(1):
        mean = channel.sum() / channel.numel()
        squares = ((channel - mean) ** 2).sum()
        means.append(mean)
        variances.append(squares / (channel.numel() - 1))
        maps.append((channel - mean) / torch.sqrt(squares / channel.numel() + 1e-5))
    return torch.stack(means), torch.stack(variances), torch.stack(maps, 1)


def expected_statistics(batches: list[Tensor]) -> dict[str, Tensor]:
    """The expected statistics of `network`: every batch has the same weight, whatever its size."""
    net = network()
    gates = {i: ByHand(nn.Identity(), E_LAMBDA) for i in (0, 4)}
    per_batch: dict[str, list[Tensor]] = {key: [] for key in statistics(net)}
    for x in batches:
        x = gates[0](nnf.conv2d(x, net[0].weight, net[0].bias))
        mean, variance, x = normalise(x)
        per_batch["1.running_mean"].append(mean)
        per_batch["1.running_var"].append(variance)
        x = (x * net[1].weight[:, None, None] + net[1].bias[:, None, None]).clamp(min=0)
        mean, variance, _ = normalise(gates[4](nnf.conv2d(x, net[4].weight)))
        per_batch["5.running_mean"].append(mean)
        per_batch["5.running_var"].append(variance)
    return {key: (sum(values) / len(batches)).detach() for key, values in per_batch.items()}


def assert_recalibrated(model: nn.Module, batches: list[Tensor]) -> None:
    # Float64: the rounding of the layer, and of a sum over a few hundred values.
    torch.testing.assert_close(
        statistics(model), expected_statistics(batches), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("training", [True, False])
def test_recalibrate_averages_statistics_over_batches(training: bool) -> None:
    batches = tensors(4, 4, 1)  # the last one is smaller and has the same weight
    model = network(dropout=0.5).train(training)
    random_state = torch.get_rng_state()
    assert recalibrate(model, batches) is model
    assert_recalibrated(model, batches)
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout drew nothing
    assert torch.is_grad_enabled()
    assert [norm.num_batches_tracked.item() for norm in (model[1], model[5])] == [3, 3]


def test_recalibrate_matches_update_bn_without_dropout() -> None:
    expected = network()
    update_bn(tensors(4, 3), expected)
    torch.testing.assert_close(
        recalibrate(network(), tensors(4, 3)).state_dict(), expected.state_dict(), rtol=0, atol=0
    )


def test_recalibrate_changes_no_parameter_and_keeps_no_graph() -> None:
    model = network()
    before = {name: p.clone() for name, p in model.named_parameters()}
    graphs = []
    model.register_forward_hook(lambda module, args, output: graphs.append(output.grad_fn))
    recalibrate(model, tensors(4))
    assert graphs == [None]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_recalibrate_turns_stochastic_depth_off() -> None:
    ops = pytest.importorskip("torchvision.ops")
    timm_layers = pytest.importorskip("timm.layers")
    expected = statistics(recalibrate(network(), tensors(4, 4)))
    for layer in (ops.StochasticDepth(0.9, "row"), timm_layers.DropPath(0.9)):
        model = network()
        model[3] = layer
        recalibrate(model.train(), tensors(4, 4))
        torch.testing.assert_close(statistics(model), expected, rtol=0, atol=0)
        assert layer.training


class Stateful(nn.Module):
    """A layer whose train() must not be called, since it may do more than set the mode."""

    def train(self, mode: bool = True) -> nn.Module:
        raise AssertionError("modes must be set one by one")

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x


def test_recalibrate_restores_modes_and_momenta() -> None:
    model = network()
    model[3] = Stateful()
    untracked = nn.BatchNorm2d(3, track_running_stats=False, momentum=0.7).double().eval()
    model.insert(0, untracked)
    for path in ("", "2", "4", "5"):
        model.get_submodule(path).training = False
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    recalibrate(model, tensors(2))
    assert [module.training for module in model.modules()] == modes
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [
        0.7,
        0.3,
        None,
    ]


def raising(error: BaseException) -> Iterator[Tensor]:
    yield from tensors(2, 2)
    raise error


def without_versions(model: nn.Module) -> str:
    """The content of a model without tensor versions, which restoring the values increases."""
    return re.sub(r"\((\d+), \d+, (True|False)\)", r"\1", str(snapshot(model)))


@pytest.mark.parametrize("error", [OSError("unreadable"), KeyboardInterrupt()])
def test_recalibrate_changes_nothing_if_the_loader_raises(error: BaseException) -> None:
    model = network(dropout=0.5).train()
    model.insert(0, nn.BatchNorm2d(3, track_running_stats=False, momentum=0.7).double())
    model[2].eval()
    held, values = without_versions(model), copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)) as caught:
        recalibrate(model, raising(error))
    assert caught.value is error
    assert without_versions(model) == held
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)


def test_recalibrate_changes_nothing_if_the_network_raises() -> None:
    model = network().train()
    held, values = without_versions(model), copy.deepcopy(model.state_dict())
    wrong = torch.ones(2, 7, 6, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="7 channels"):
        recalibrate(model, [*tensors(2), wrong])
    assert without_versions(model) == held
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)


def labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, labels(x)),
        lambda x: [x, labels(x), "paths"],
        lambda x: {"labels": labels(x), "mask": x[:, 0].long(), "soft": x[:, 0, 0], "image": x},
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ],
    ids=["tensor", "tuple", "list", "dict", "channels_last"],
)
def test_recalibrate_accepts_batches_of_every_form(form: Callable[[Tensor], object]) -> None:
    batches = tensors(4, 2)
    assert_recalibrated(recalibrate(network(), [form(x) for x in batches]), batches)


def test_recalibrate_accepts_a_data_loader_of_pairs() -> None:
    images = torch.cat(tensors(4, 3))
    loader = DataLoader(TensorDataset(images, labels(images)), batch_size=2)
    assert_recalibrated(recalibrate(network(), loader), list(images.split(2)))


def test_recalibrate_keeps_channels_last() -> None:
    model = network().to(memory_format=torch.channels_last)
    assert_recalibrated(recalibrate(model, tensors(4, 2)), tensors(4, 2))
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)


def test_recalibrate_takes_max_batches_from_an_iterator() -> None:
    batches = iter(tensors(2, 2, 2, 2))
    model = recalibrate(network(), batches, max_batches=3)
    assert_recalibrated(model, tensors(2, 2, 2, 2)[:3])
    assert len(list(batches)) == 1
    assert_recalibrated(recalibrate(model, tensors(2), max_batches=9), tensors(2))


def test_recalibrate_moves_batches_to_the_device(device: torch.device) -> None:
    model = recalibrate(network().to(device), tensors(4, 2))
    assert_recalibrated(model.cpu(), tensors(4, 2))

    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].device.type))
    model.register_forward_pre_hook(lambda module, args: args[0].new_ones(2, 3, 6, 6, device="cpu"))
    recalibrate(model, tensors(2), device="meta")
    assert seen == ["meta"]


class Branches(nn.Module):
    """In a forward pass, one batch norm is called once, one twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never = (nn.BatchNorm2d(3).double() for _ in range(3))
        nn.init.constant_(self.never.running_mean, 7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(x) + self.twice(x + 2))


def test_recalibrate_leaves_batch_norms_that_are_not_called() -> None:
    model = recalibrate(Branches(), tensors(4))
    torch.testing.assert_close(model.never.running_mean, torch.full_like(model.never.bias, 7.0))
    mean, variance, _ = normalise(tensors(4)[0])
    torch.testing.assert_close(model.twice.running_mean, mean + 1)
    torch.testing.assert_close(model.twice.running_var, variance)


def test_recalibrate_leaves_batch_norms_that_stopped_tracking() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double().train()
    nn.init.constant_(model[0].running_mean, 7.0)
    model[0].track_running_stats = False
    recalibrate(model, tensors(4))
    mean, _, _ = normalise((tensors(4)[0] - 7) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[0].running_mean, torch.full_like(mean, 7.0))


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, "BatchNormAct2d"])
def test_recalibrate_accepts_batch_norm_subclasses(kind: type[nn.Module] | str) -> None:
    if isinstance(kind, str):
        kind = getattr(pytest.importorskip("timm.layers"), kind)
    model = nn.Sequential(kind(3)).double()
    if hasattr(model[0], "drop"):
        model[0].drop = nn.Dropout(0.5)
    model.append(nn.BatchNorm2d(3).double())
    recalibrate(model.train(), tensors(4))
    mean, variance, normalised = normalise(tensors(4)[0])
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)
    act = torch.relu if hasattr(model[0], "act") else torch.clone
    mean, variance, _ = normalise(act(normalised))
    torch.testing.assert_close(model[1].running_mean, mean)


def test_recalibrate_works_on_unfrozen_batch_norms() -> None:
    layers = pytest.importorskip("timm.layers")
    frozen = layers.freeze_batch_norm_2d(network())
    with pytest.raises(ValueError, match=r"got FrozenBatchNorm2d.*unfreeze_batch_norm_2d$"):
        recalibrate(frozen, tensors(4))
    unfrozen = recalibrate(layers.unfreeze_batch_norm_2d(frozen), tensors(4))
    found = layers.freeze_batch_norm_2d(unfrozen).state_dict()
    for key, value in expected_statistics(tensors(4)).items():
        torch.testing.assert_close(found[key], value)


NOT_APPLICABLE = (
    r"^recalibrate does not apply: expected batch norms with running statistics, got {}\. Layer, "
    r"group and instance norms compute statistics from each input and keep none: fine-tune a model "
)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(1, 3)), "GroupNorm, LayerNorm"),
        (nn.Conv2d(3, 3, 1), "no norm"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d"),
    ],
)
def test_recalibrate_refuses_models_without_running_statistics(model: nn.Module, got: str) -> None:
    with pytest.raises(ValueError, match=NOT_APPLICABLE.format(got)):
        recalibrate(model, tensors(2))


def test_recalibrate_refuses_lazy_models() -> None:
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3))
    with pytest.raises(
        ValueError,
        match=r"^the model is lazy and not yet initialised, at 0\.weight; run the model once",
    ):
        recalibrate(model, tensors(2))
    with pytest.raises(ValueError, match=r"initialised, at running_mean;"):
        recalibrate(nn.LazyBatchNorm2d(affine=False), tensors(2))


def test_recalibrate_refuses_a_model_that_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"^expected an nn\.Module, got list$"):
        recalibrate([network()], tensors(2))


@pytest.mark.parametrize("exhausted", [True, False])
def test_recalibrate_refuses_empty_loaders(exhausted: bool) -> None:
    model = network()
    loader = iter(tensors(2)) if exhausted else []
    if exhausted:
        list(loader)
    before = statistics(model)
    with pytest.raises(
        ValueError,
        match=r"^expected at least one batch that reaches a batch norm, got none: is the loader "
        r"empty, or an exhausted iterator\?$",
    ):
        recalibrate(model, loader)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_recalibrate_refuses_invalid_max_batches(count: float) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^max_batches must be a positive integer, or None for all batches, got {count}$",
    ):
        recalibrate(network(), tensors(2), max_batches=count)


@pytest.mark.parametrize(("loader", "got"), [(torch.ones(2, 3, 6, 6), "Tensor"), (3, "int")])
def test_recalibrate_refuses_invalid_loaders(loader: object, got: str) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^loader must be an iterable of batches, got {got}; for one tensor of images "
        r"pass images\.split\(32\)$",
    ):
        recalibrate(network(), loader)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ("image.png", "str"),
        ([], "list"),
        (([torch.ones(3, 6, 6)], []), "tuple"),
        ({"left": torch.ones(2, 3, 6, 6), "right": torch.ones(2, 3, 6, 6)}, "dict of left, right"),
        ({"labels": torch.ones(2)}, "dict of labels"),
    ],
)
def test_recalibrate_refuses_batches_without_one_tensor_of_images(batch: object, got: str) -> None:
    model = network()
    before = statistics(model)
    with pytest.raises(
        TypeError,
        match=rf"^every batch must be a tensor of images, .* got a {got}; select the images",
    ):
        recalibrate(model, [*tensors(2), batch])
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_recalibrate_shows_progress_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        recalibrate(network(), tensors(2, 2, 2), max_batches=2)
        shown = stream.getvalue()
        assert ("recalibrate" in shown and "0/2" in shown) == stream.isatty()
        assert bool(shown) == stream.isatty()


def test_recalibrate_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert_recalibrated(recalibrate(network(), tensors(2)), tensors(2))


SHARDS = {0: (4, 2, 3), 1: (2,)}  # sizes of the batches that each process sees


def shard(rank: int) -> list[Tensor]:
    return tensors(*SHARDS[rank], seed=rank)


def attempt(model: nn.Module, loader: object) -> str:
    before = statistics(model)
    try:
        recalibrate(model, loader)
    except (OSError, RuntimeError, ValueError) as error:
        after = statistics(model)
        same = all(torch.equal(after[key], value) for key, value in before.items())
        return f"{type(error).__name__}: {error}" if same else "changed"
    return "no error"


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=30)  # in case one process waits for the other
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    model = DistributedDataParallel(network())
    # First, since the first forward of the wrapper waits for all processes.
    unequal = statistics(recalibrate(model, shard(0) if rank == 0 else []).module)
    failed = attempt(model, shard(0) if rank == 0 else raising(OSError("unreadable")))
    empty = attempt(model, [])
    together = statistics(recalibrate(model, shard(rank)).module)
    plain = plain_and_attached()[0]
    referred = statistics(recalibrate(model, shard(rank), reference=plain).module)
    # A model that is not wrapped needs no call in the other process.
    alone = statistics(recalibrate(network(), shard(0))) if rank == 0 else {}
    found = {"failed": failed, "empty": empty}
    found |= {"referred": referred, "together": together, "unequal": unequal, "alone": alone}
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed")
def test_recalibrate_averages_over_the_batches_of_all_processes(tmp_path: Path) -> None:
    # The processes fork from one that has imported torch and, for the wrapper, torch._dynamo.
    multiprocessing.set_forkserver_preload(["torch._dynamo"])
    torch.multiprocessing.start_processes(
        work, args=(str(tmp_path),), nprocs=2, start_method="forkserver"
    )
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = expected_statistics(shard(0) + shard(1))
    first = expected_statistics(shard(0))
    plain, attached = plain_and_attached()
    referred = statistics(recalibrate(attached, shard(0) + shard(1), reference=plain))
    for result in results:
        torch.testing.assert_close(result["together"], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result["referred"], referred, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result["unequal"], first, rtol=1e-11, atol=1e-11)
        assert result["empty"].startswith("ValueError: expected at least one batch")
    torch.testing.assert_close(results[0]["together"], results[1]["together"], rtol=0, atol=0)
    torch.testing.assert_close(results[0]["alone"], first, rtol=1e-11, atol=1e-11)
    assert results[1]["failed"] == "OSError: unreadable"
    assert results[0]["failed"] == (
        "RuntimeError: recalibrate failed in another process, which raises the cause; the "
        "statistics are unchanged in all processes"
    )


def test_recalibrate_recovers_outputs_of_a_real_network() -> None:
    for package in ("timm", "skimage.data", "torchvision"):
        pytest.importorskip(package, reason="a real network and real photographs")
    real = importlib.import_module("tests.networks.test_real_weights")  # or skips
    model = real.timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(real.to_timm(real.read_weights()))
    photographs = torch.cat([real.photograph(name) for name in real.CLASSES])
    others = ("astronaut", "brick", "chelsea", "coins", "grass", "gravel", "moon", "page", "rocket")
    plain = real.logits_of(model, photographs)
    attach(model, e_lambda=E_LAMBDA)
    before = nnf.cosine_similarity(real.logits_of(model, photographs), plain)
    recalibrate(model, [torch.cat([real.photograph(name) for name in others])])
    after = nnf.cosine_similarity(real.logits_of(model, photographs), plain)
    assert before.max() < 0.2
    assert after.min() > 0.4


def plain_and_attached() -> tuple[nn.Sequential, nn.Sequential]:
    attached = network()
    return detach(copy.deepcopy(attached)), attached


def test_recalibrate_with_reference_corrects_statistics_from_training() -> None:
    plain, attached = plain_and_attached()
    trained, batches = statistics(plain), tensors(6, 4, 5)
    measured_plain = statistics(recalibrate(copy.deepcopy(plain), batches))
    measured = statistics(recalibrate(copy.deepcopy(attached), batches))
    modes = {name: module.training for name, module in plain.named_modules()}
    found = statistics(recalibrate(attached, batches, reference=plain))
    for key, value in trained.items():
        if key.endswith("mean"):
            expected = value + measured[key] - measured_plain[key]
        else:
            ratio = (measured[key] + 1e-5) / (measured_plain[key] + 1e-5)
            expected = (value + 1e-5) * ratio - 1e-5
        assert not torch.allclose(found[key], measured[key], rtol=1e-3)
        torch.testing.assert_close(found[key], expected, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, trained[key]) for key, value in statistics(plain).items())
    assert {name: module.training for name, module in plain.named_modules()} == modes
    # Repeating it changes nothing: the reference, not the model, holds the trained statistics.
    again = statistics(recalibrate(attached, batches, reference=plain))
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_recalibrate_with_itself_as_reference_changes_nothing() -> None:
    plain, _ = plain_and_attached()
    found = statistics(recalibrate(copy.deepcopy(plain), tensors(6, 4), reference=plain))
    torch.testing.assert_close(found, statistics(plain), rtol=1e-11, atol=1e-11)


def test_recalibrate_refuses_a_reference_with_other_batch_norms() -> None:
    plain, attached = plain_and_attached()
    message = re.escape(
        "reference must be the same network without SimAM, on the same device and not wrapped; its "
        "batch norms differ at 5"
    )
    for other in (nn.BatchNorm2d(6), nn.BatchNorm2d(5, device="meta")):
        plain[5] = other
        with pytest.raises(ValueError, match=f"^{message}$"):
            recalibrate(attached, tensors(4), reference=plain)
    with pytest.raises(TypeError, match=r"Module"):
        recalibrate(attached, tensors(4), reference="plain")


def test_recalibrate_with_reference_refuses_an_iterator() -> None:
    plain, attached = plain_and_attached()
    with pytest.raises(ValueError, match=r"^reference= iterates the loader twice, .*DataLoader$"):
        recalibrate(attached, iter(tensors(4)), reference=plain)


def test_recalibrate_changes_nothing_if_the_reference_raises() -> None:
    plain, attached = plain_and_attached()
    plain[7] = nn.Linear(3, 2).double()
    before = statistics(attached)
    with pytest.raises(RuntimeError):
        recalibrate(attached, tensors(4), reference=plain)
    torch.testing.assert_close(statistics(attached), before, rtol=0, atol=0)
