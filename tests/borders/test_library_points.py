"""`plan` with an example, in models of other libraries: the right places, read from their code."""

import copy
from importlib.metadata import version

import pytest
import torch

from simam import plan
from tests.helpers.borders import needs
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


@pytest.mark.parametrize("facts", MODELS)
def test_plan_with_an_example_finds_the_places_of_a_library(facts: LibraryModel) -> None:
    assert version(facts.library) == facts.version
    model, example = facts.build(), facts.example()
    convolutions = spatial_convolutions(model)
    assert set(facts.points) <= set(convolutions)
    for glob in facts.none:
        selected = matching(convolutions, glob)
        assert selected
        assert not set(selected) & set(facts.points)

    before = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    types = [type(m) for m in model.modules()]
    random_state = torch.get_rng_state()

    if facts.points:
        found = [insertion.path for insertion in plan(model, example=example)]
        assert sorted(found) == sorted(facts.points)
    else:
        with pytest.raises(ValueError, match="found no place"):
            plan(model, example=example)

    assert [type(m) for m in model.modules()] == types
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not any(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        run(model, example)
