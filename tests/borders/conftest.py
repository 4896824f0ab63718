"""Record what a real tool did with an attached network, for docs/compatibility.md."""

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

OUTCOMES = ("works", "works, with a note", "refused clearly", "fails")


@pytest.fixture(scope="session")
def _recorded(request: pytest.FixtureRequest) -> Iterator[dict[str, list[dict[str, object]]]]:
    """The cases of this run of pytest by tool; they replace those of the same name in the file.

    A tool's other cases stay if they had the same Python and torch: files of tests share a tool.
    The file stays as it is if a test has failed.
    """
    recorded: dict[str, list[dict[str, object]]] = {}
    yield recorded
    target = os.environ.get("SIMAM_BORDERS_RESULTS")
    if not target or not recorded or request.session.testsfailed:
        return
    file = Path(target)
    results = json.loads(file.read_text()) if file.exists() else {}
    versions = {"python": platform.python_version(), "torch": version("torch")}
    run = {"date": datetime.date.today().isoformat(), **versions}
    for tool, cases in recorded.items():
        before = results.get(tool, {"cases": []})
        names = {case["case"] for case in cases}
        stay = [
            case
            for case in before["cases"]
            if versions.items() <= before.items() and case["case"] not in names
        ]
        results[tool] = {**run, "cases": stay + cases}
    file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


@pytest.fixture
def record(_recorded: dict[str, list[dict[str, object]]]) -> Callable[..., None]:
    """A function that records one case. Call it last, when every assertion has held."""

    def record(tool: str, case: str, outcome: str, **details: object) -> None:
        """Record a case.

        Args:
            tool (str): name and version, for example "timm 1.0.31".
            case (str): what was done, for example "export to ONNX".
            outcome (str): one of OUTCOMES.
            details (any): network (str); difference (float), the largest relative difference from
                the right values; without (float), the same for a network without SimAM; note (str).
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"the outcome must be one of {OUTCOMES}, got {outcome!r}")
        _recorded.setdefault(tool, []).append({"case": case, "outcome": outcome, **details})

    return record
