"""`plan` with an example, in models of other libraries: the right places, read from their code."""

from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simam import plan
from simam.placement.rule import find_insertions
from tests.helpers.borders import needs, tool
from tests.helpers.library_points import (
    LibraryModel,
    library_models,
    matching,
    run,
    spatial_convolutions,
)

MODELS = [
    pytest.param(model, id=f"{model.library}: {model.name}", marks=needs(*model.needs))
    for model in library_models()
]
ANALYSED = Counter(model.library for model in library_models() if not model.listed)


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
    """The number of places in each model that has been analysed, by library."""
    return defaultdict(list)


@pytest.mark.parametrize("facts", MODELS)
def test_plan_with_an_example_finds_the_points_of_a_library(
    facts: LibraryModel, found: dict[str, list[int]], record: Callable[..., None]
) -> None:
    assert version(facts.library) == facts.version
    model, example = facts.build(), facts.example()
    convolutions = spatial_convolutions(model)
    assert set(facts.points) <= set(convolutions)
    for glob in facts.none:
        selected = matching(convolutions, glob)
        assert selected
        assert not set(selected) & set(facts.points)

    expected = outputs(facts.build(), example)
    before = state(model)
    random_state = torch.get_rng_state()

    if facts.points and not facts.listed:
        hosts = [insertion.path for insertion in plan(model, example=example)]
        assert sorted(hosts) == sorted(facts.points)
    else:
        with pytest.raises(ValueError, match="found no place"):
            plan(model, example=example)
    if facts.listed:
        _, unanalysed, _ = find_insertions(model, "conv", example)
        blocks = [block.block for block in unanalysed]
        assert sorted(blocks) == sorted(path.rpartition(".")[0] for path in facts.points)

    assert torch.equal(torch.get_rng_state(), random_state)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(same(after[name], before[name]) for name in before)
    # Some models keep tensors of their last run in plain attributes, such as a cache.
    assert all(map(torch.equal, outputs(model, example), expected))

    case = "`plan` with an example"
    if facts.listed:
        record(tool(facts.library), case, "refused clearly", network=facts.name)
        return
    counts = found[facts.library]
    counts.append(len(facts.points))
    if len(counts) == ANALYSED[facts.library]:  # one line for each library
        network = f"models: {len(counts)}, places: {sum(counts)}"
        record(tool(facts.library), case, "works", network=network)


@torch.no_grad()
def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that a model returns."""
    torch.manual_seed(0)
    leaves = pytree.tree_leaves(run(model, example))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def state(model: nn.Module) -> dict[str, Any]:
    """Copies of the tensors, and of each module its class, its mode and its number of hooks."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = {
        f"{path} (module)": (
            type(module),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    }
    return modules | {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
