"""Imports within simam run downwards only, without cycles."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "simam"

# From the bottom. A module imports from the layers below its own; within a layer only as listed.
LAYERS = [
    {"messages"},
    {"state_dict", "weights_file", "modes", "batches"},  # anyone may import them
    {"kernels"},
    {"reference", "masked", "ops"},
    {"functional"},
    {"module", "guards"},
    {"hosts", "identify"},
    {"placement"},
    {"attach", "convert", "checkpoints", "models", "recalibrate", "attention_maps"},
    {""},  # simam itself, which holds the public names
    {"cli"},
    {"__main__"},
]
WITHIN_A_LAYER = {
    ("weights_file", "state_dict"),
    ("masked", "reference"),
    ("ops", "reference"),
    ("models", "attach"),
    ("models", "checkpoints"),
}


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in SOURCE.rglob("*.py")}


def imported(name: str, text: str) -> Iterator[str]:
    """The modules of simam that a module imports, at its top or inside a function."""
    is_package = name == "" or FILES.get(name, Path()).name == "__init__.py"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        package = name.split(".") if name else []
        package = package[: len(package) - node.level + is_package]
        base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            full = f"{base}.{alias.name}".strip(".")
            yield full if full in FILES else base


def violations(name: str, text: str) -> list[str]:
    """The imports of a module that do not run downwards."""
    heights = {top: height for height, layer in enumerate(LAYERS) for top in layer}
    own = name.partition(".")[0]
    found = []
    for other in imported(name, text):
        top = other.partition(".")[0]
        inside = top == own or (own, top) in WITHIN_A_LAYER
        if heights[top] >= heights[own] and not inside:
            found.append(f"{name} imports {other}")
    return found


def test_imports_run_downwards() -> None:
    assert [v for name, file in FILES.items() for v in violations(name, file.read_text())] == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("functional", "from .attach import attach", ["functional imports attach"]),
        ("kernels.cpu", "def f():\n    from ..ops import x", ["kernels.cpu imports ops"]),
        ("placement.rule", "from .. import attach", ["placement.rule imports attach"]),
        ("attach", "from . import cli, module", ["attach imports cli"]),
        ("checkpoints", "from .attach import attach", ["checkpoints imports attach"]),
        ("state_dict", "from .ops import simam_forward", ["state_dict imports ops"]),
        ("cli.maps", "from ..attach import attach", []),
    ],
)
def test_violations_are_found(name: str, text: str, expected: list[str]) -> None:
    assert violations(name, text) == expected


def test_imports_have_no_cycle() -> None:
    graph = {name: {*imported(name, file.read_text())} - {name} for name, file in FILES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)
    graph["messages"].add("attach")
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_imports_are_relative() -> None:
    """`imported` reads relative imports only, so there must be no absolute ones."""
    absolute = [
        name
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "simam")
        or (isinstance(node, ast.Import) and any(a.name.startswith("simam") for a in node.names))
    ]
    assert absolute == []
