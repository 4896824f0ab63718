"""Modules that a user selects: by globs over their paths, or by a predicate."""

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

Selector: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]


def match_globs(
    globs: Iterable[str], paths: Collection[str], unmatched: Callable[[str], Exception]
) -> set[str]:
    """Return the paths that match a glob; raise `unmatched(glob)` for a glob that matches none."""
    chosen = set()
    for glob in globs:
        matches = {path for path in paths if fnmatchcase(path, glob)}
        if not matches:
            raise unmatched(glob)
        chosen |= matches
    return chosen


def select(
    selector: Selector,
    modules: Mapping[str, nn.Module],
    argument: str,
    of_what: str,
    preferred: Mapping[str, nn.Module] | None = None,
) -> set[str]:
    """The selected paths. A selector, or one of its globs, that selects nothing is an error.

    What selects some of the preferred modules selects no others.
    """
    preferred = preferred or {}
    form = f"{argument} must be a glob, several globs, or a predicate (path, module) -> bool"
    if isinstance(selector, nn.Module) or not (
        callable(selector) or isinstance(selector, Iterable)
    ):
        raise TypeError(f"{form}, got {selector!r}")
    if callable(selector):
        chosen = {path for path, module in preferred.items() if selector(path, module)}
        chosen = chosen or {path for path, module in modules.items() if selector(path, module)}
    else:
        globs = [selector] if isinstance(selector, str) else list(selector)
        if not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"{form}, got {selector!r}")

        def unmatched(glob: str) -> ValueError:
            return _unmatched(f"{argument}={glob!r}", glob, modules, of_what)

        chosen = set()
        for glob in globs:
            matches = match_globs([glob], modules, unmatched)
            chosen |= matches & preferred.keys() or matches
    if not chosen:
        raise ValueError(f"{argument}={selector!r} selects none of {of_what}")
    return chosen


def _unmatched(asked: str, glob: str, modules: Iterable[str], of_what: str) -> ValueError:
    close = get_close_matches(glob, modules, n=3, cutoff=0.4)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    return ValueError(f"{asked} matches none of {of_what}{hint}")
