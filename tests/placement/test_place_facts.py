"""The rule with place= on public networks, against facts from recorded runs of these networks."""

import json
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the list of convolutions names models of timm")
pytest.importorskip("torchvision", reason="the list names models of torchvision")

from simam import plan
from simam.placement import find_insertions
from tests.helpers.place_facts import record
from tests.placement.test_facts import EXPECTED as CONVOLUTIONS
from tests.placement.test_facts import build, sampled

FACTS = json.loads(Path(__file__).with_name("place_points.json").read_text())

SAMPLE = {
    "mobilenet_v2",  # with and without skips
    "r2plus1d_18",
    "convnext_tiny",  # no host at either place
    "raft_small",  # no norm in some of its blocks
}


@pytest.mark.parametrize("name", sampled(CONVOLUTIONS["torchvision"], SAMPLE))
def test_plan_matches_facts_about_places(name: str) -> None:
    model = build("torchvision", name)
    for place in ("norm", "branch"):
        insertions, unanalysed, _ = find_insertions(model, place)
        assert sorted(i.path for i in insertions) == FACTS[place].get(name, [])
        reasons = {u.block: u.reason for u in unanalysed if "no host for place" in u.reason}
        absent = FACTS["none"][place].get(name, {})
        in_the_way = {block: function for function, blocks in absent.items() for block in blocks}
        assert reasons.keys() == in_the_way.keys()
        assert all(function in reasons[block] for block, function in in_the_way.items())


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("norm", "block.0 is not followed by a norm, but by permute"),
        (
            "branch",
            "it ends in the function mul with layer_scale, and no module returns that value",
        ),
    ],
)
def test_plan_refuses_convnext_at_other_places(place: str, reason: str) -> None:
    model = build("torchvision", "convnext_tiny").features[1][0]
    with pytest.raises(ValueError, match=rf"CNBlock, no host for place='{place}': {reason}"):
        plan(model, place=place)


@pytest.mark.parametrize(
    "name",
    sampled(
        [n for n in CONVOLUTIONS["none"] if n.startswith("torchvision/")] + ["timm/selecsls42"],
        {"timm/selecsls42"},
    ),
)
def test_plan_refuses_networks_without_residual_branches_at_every_place(name: str) -> None:
    model = build(*name.split("/"))
    for place in ("norm", "branch"):
        with pytest.raises(ValueError, match=r"^found no place for SimAM"):
            plan(model, place=place)


@pytest.mark.parametrize("name", sampled(CONVOLUTIONS["torchvision"], {"mobilenet_v2"}))
def test_facts_about_places_match_a_recorded_run(name: str) -> None:
    for place, (hosts, absent) in record(name).items():
        assert hosts == FACTS[place].get(name, [])
        assert absent == FACTS["none"][place].get(name, {})
