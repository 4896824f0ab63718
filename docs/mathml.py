"""A hook for MkDocs that converts formulas to MathML during the build.

Browsers render MathML natively, so the pages need no script and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# The output of pymdownx.arithmatex for $$...$$, and for $...$ with the punctuation after it.
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>([.,:;)]*)', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page; math.css lets a wide equation scroll in its div."""
    content = BLOCK.sub(
        lambda match: f'<div class="equation">{_mathml(match[1], "block")}</div>', content
    )
    return INLINE.sub(
        lambda match: f'<span class="formula">{_mathml(match[1], "inline")}{match[2]}</span>',
        content,
    )


def _mathml(formula: str, display: str) -> str:
    return convert(html.unescape(formula).strip(), display=display)
