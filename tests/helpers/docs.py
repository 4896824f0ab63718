"""The code on the pages of docs/, for tests that run it."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(page: str) -> dict[str, list[str]]:
    """The Python blocks under each heading (of the second level) that has any."""
    sections = re.split(r"^## (.+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    blocks = {
        heading: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for heading, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    return {heading: found for heading, found in blocks.items() if found}


def run_section(page: str, heading: str, **names: Any) -> dict[str, Any]:
    """Run the Python blocks under a heading one after the other; return the names they define.

    Args:
        page (str): for example "frameworks.md".
        heading (str): without its number signs.
        names (any): what the blocks find defined.
    """
    namespace = {"__name__": "docs", **names}
    for block in python_blocks(page)[heading]:
        exec(block, namespace)
    return namespace
