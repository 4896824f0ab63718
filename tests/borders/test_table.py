"""docs/compatibility.md shows what was recorded."""

import json

import pytest

from tests.borders.conftest import OUTCOMES
from tests.borders.table import PAGE, RESULTS, counters, render, tools

RUN = {"date": "2026-01-02", "python": "3.11.7", "torch": "2.14.1"}


def test_page_shows_the_recorded_results() -> None:
    page = PAGE.read_text()
    assert render(page, json.loads(RESULTS.read_text())) == page


def test_every_recorded_case_has_an_outcome() -> None:
    results = json.loads(RESULTS.read_text())
    assert results
    for tool, run in results.items():
        assert run.keys() == {*RUN, "cases"}, tool
        for case in run["cases"]:
            assert case["outcome"] in OUTCOMES
            needs_note = case["outcome"] in ("works, with a note", "fails")
            assert bool(case.get("note")) is needs_note or "plain" in case, (tool, case)


def test_networks_of_one_case_share_a_row() -> None:
    case = {"case": "fold", "outcome": "works"}
    cases = [
        {**case, "network": "a", "difference": 1e-6, "without": 0.5},
        {**case, "network": "b", "difference": 2e-6, "without": 0.25},
        {**case, "network": "c", "outcome": "fails", "note": "why"},
        {"case": "count", "outcome": "works", "plain": [2e9, 1e6]},
    ]
    assert tools({"tool 1.0": {**RUN, "cases": cases}}).splitlines()[2:] == [
        "| tool 1.0 | fold | a, b | works | 2.0e-06 | 0.25 |",
        "| tool 1.0 | fold | c | fails: why |  |  |",
    ]


def test_counts_are_shown_in_g_and_m() -> None:
    counts = {"plain": [2e9, 5e6], "attached": [1e9, 4e6], "detached": [2e9, 5e6]}
    case = {"case": "count", "outcome": "works", **counts}
    assert counters({"tool 1.0": {**RUN, "cases": [case]}}).splitlines()[2:] == [
        "| tool 1.0 | 2.000 / 5.00 | 1.000 / 4.00 | 2.000 / 5.00 |"
    ]


def test_render_refuses_a_page_without_the_comments() -> None:
    with pytest.raises(ValueError, match=r"^expected '<!-- runs -->"):
        render("# Page", {})
