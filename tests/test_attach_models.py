"""Real networks through attach and back."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from by_hand import PLACES, by_hand, example, parameter_names, plain, run
from torch import Tensor, nn

from simam import SimAM, attach, detach

# Of a detection model, whose pyramid takes a list and is not residual.
pytestmark = pytest.mark.filterwarnings("ignore:left without SimAM:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # Threads that wait for each other at every layer are slower than one on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def modules(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", PLACES)
def test_outputs_and_gradients_are_those_of_simam_by_hand(name: str) -> None:
    model = plain(name).double()
    reference = by_hand(model, name, e_lambda=0.1)
    x = example(name).double()
    with torch.no_grad():
        without, expected = run(model.eval(), x), run(reference.eval(), x)
        torch.testing.assert_close(run(attach(model, e_lambda=0.1), x), expected)
        assert without.shape != expected.shape or distance(without, expected) > 1e-3

    outputs, gradients = [], []
    for network in (model.train(), reference.train()):
        torch.manual_seed(2)  # for dropout
        outputs.append(run(network, x))
        outputs[-1].backward(torch.randn_like(outputs[-1]))
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(*outputs)
    assert [n for n, _ in model.named_parameters()] == parameter_names(reference)
    # A convolution's bias before a batch norm has no gradient but rounding, so in all.
    assert distance(*(torch.cat([g.flatten() for g in each]) for each in gradients)) < 1e-9


@pytest.mark.parametrize("name", PLACES)
def test_weights_load_before_and_after_and_detach_restores(name: str) -> None:
    model, other = plain(name).eval(), plain(name).eval()
    x, before, weights = example(name), modules(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = run(model, x)
        attach(model)
        assert list(model.state_dict()) == list(weights)
        assert model.load_state_dict(weights, strict=True) == ([], [])
        assert other.load_state_dict(model.state_dict(), strict=True) == ([], [])
        detach(model)
        assert modules(model) == before
        assert model.load_state_dict(weights, strict=True) == ([], [])
        assert torch.equal(run(model, x), expected)
        assert torch.equal(run(other, x), expected)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = plain(name).eval()
    before, attached = modules(model), modules(attach(model, e_lambda=0.1))
    copied = duplicate(model)
    assert modules(copied) == attached
    with torch.no_grad():
        assert torch.equal(run(copied, example(name)), run(model, example(name)))
    assert modules(detach(copied)) == before
    assert modules(model) == attached
    assert not any(isinstance(module, SimAM) for module in copied.modules())
