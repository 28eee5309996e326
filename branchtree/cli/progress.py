"""A bar for work whose length is known once it has begun."""

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
    """A bar on standard error that appears with the first advance and is gone afterwards.

    Until then an error in an input is all there is to read.
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
