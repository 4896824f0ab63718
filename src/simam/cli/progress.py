"""The progress bar of the command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

# Called with a stage, its finished steps, and the number of its steps.
Progress: TypeAlias = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on stderr, if stderr is a terminal and tqdm, which is optional, is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda stage, done, total: None
        return
    with tqdm(total=1, disable=None, leave=False, bar_format="{desc} {bar} {n}/{total}") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.n, bar.total = done, total
            bar.refresh()

        yield show
