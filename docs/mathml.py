"""A hook for MkDocs: turns formulas into MathML while building.

Browsers draw MathML themselves, so the pages need no script and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $$...$$, and of $...$ with the punctuation after it.
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>([.,:;)]*)', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    content = BLOCK.sub(lambda found: _mathml(found[1], "block"), content)
    return INLINE.sub(
        lambda found: f'<span class="formula">{_mathml(found[1], "inline")}{found[2]}</span>',
        content,
    )


def _mathml(formula: str, display: str) -> str:
    return convert(html.unescape(formula).strip(), display=display)
