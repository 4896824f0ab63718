"""Write the tables of docs/compatibility.md from results.json: python tests/borders/table.py."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

Results = dict[str, dict[str, Any]]


def markdown(header: list[str], rows: list[list[str]], alignments: str) -> str:
    rule = ["---:" if side == ">" else "---" for side in alignments]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def runs(results: Results) -> str:
    """Which tool ran when, and with which Python and torch."""
    tools: dict[str, list[str]] = {}
    for tool, run in results.items():
        key = f"{run['date']}, Python {run['python']}, torch {run['torch']}"
        tools.setdefault(key, []).append(tool)
    return "\n".join(f"- {key}: {'; '.join(names)}." for key, names in sorted(tools.items()))


def tools(results: Results) -> str:
    """A row for each tool, case and outcome; the networks share a row."""
    rows = []
    for tool, run in results.items():
        cases = [case for case in run["cases"] if "plain" not in case]
        kinds = {(c["case"], c["outcome"], c.get("note", "")): None for c in cases}
        for kind in kinds:
            same = [c for c in cases if (c["case"], c["outcome"], c.get("note", "")) == kind]
            case, outcome, note = kind
            networks = ", ".join(dict.fromkeys(c["network"] for c in same))
            differences = [c["difference"] for c in same if "difference" in c]
            without = [c["without"] for c in same if "without" in c]
            rows.append(
                [
                    tool,
                    case,
                    networks,
                    f"{outcome}: {note}" if note else outcome,
                    f"{max(differences):.1e}" if differences else "",
                    f"{min(without):.2g}" if without else "",
                ]
            )
    header = ["tool", "what", "networks", "outcome", "difference", "without SimAM"]
    return markdown(header, rows, "<<<<>>")


def counters(results: Results) -> str:
    """Multiply-adds in G and parameters in M, as each counter gives them."""

    def cell(counts: list[int]) -> str:
        return f"{counts[0] / 1e9:.3f} / {counts[1] / 1e6:.2f}"

    rows = [
        [tool, *(cell(case[state]) for state in ("plain", "attached", "detached"))]
        for tool, run in results.items()
        for case in run["cases"]
        if "plain" in case
    ]
    return markdown(["counter", "plain", "attached", "inside `detached`"], rows, "<>>>")


def render(page: str, results: Results) -> str:
    """The page with its tables replaced; each stands between two comments."""
    for table in (runs, tools, counters):
        name = table.__name__
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = page.partition(start)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"expected {start!r} and {end!r} in {PAGE}")
        page = before + start + "\n" + table(results) + "\n" + end + after
    return page


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
