"""Checkpoints written one at a time, in the background where a run asks for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

log = logging.getLogger("branchtree")


class CheckpointWriter:
    """Does one write after the other. In the background, training goes on meanwhile and learns of a failure later.

    Used as a context, it is left only when nothing is being written, unless the process is told to stop at once.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._under_way: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except Exception as second:  # the first failure is the one to tell of
                log.warning("%s", second)

    def put(self, write: Callable[[], None]) -> None:
        """Do a write once the one before is done. Raises what that one, or without a background this one, raised."""
        self.wait()
        if not self._background:
            write()
            return
        future: Future[None] = Future()
        # A daemon, so that a process that is told to stop at once does: what it leaves is a folder without its name.
        threading.Thread(target=_fulfil, args=(future, write), name="checkpoint", daemon=True).start()
        self._under_way = future

    def check(self) -> None:
        """Raise what a write raised that has ended since."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the write raised."""
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()


def _fulfil(future: Future[None], write: Callable[[], None]) -> None:
    try:
        write()
    except BaseException as error:  # raised again by the thread that trains
        future.set_exception(error)
    else:
        future.set_result(None)
