"""A progress bar for work whose length is known only once it has begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import Progress

from branchtree.cli.console import make_console

if TYPE_CHECKING:
    from branchtree.studies.common.output import Advance


@contextmanager
def late_progress(what: str) -> Iterator[Advance]:
    """Return a context with a bar on standard error that appears at the first advance and disappears at the end.

    Before the first advance nothing is printed, so that an error in an input is easy to see.
    """
    progress = Progress(console=make_console(stderr=True), transient=True)
    bar = progress.add_task(what, total=None)

    def advance(done: int, total: int) -> None:
        progress.start()
        progress.update(bar, completed=done, total=total)

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
