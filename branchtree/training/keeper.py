"""A run's checkpoints as the training loop uses them: going on from one, writing others, saying what is kept."""

from __future__ import annotations

import logging
from types import TracebackType

from branchtree.files.writing import writing
from branchtree.run.directory import METRICS
from branchtree.training.checkpoint import (
    DAMAGED,
    LATER,
    list_checkpoints,
    set_aside,
    take_snapshot,
    write_checkpoint,
)
from branchtree.training.position import position
from branchtree.training.restore import load_checkpoint
from branchtree.training.session import Session
from branchtree.training.writer import CheckpointWriter

log = logging.getLogger("branchtree")


class CheckpointKeeper:
    """Restores and saves one session. Used as a context, it is left only when nothing is being written."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._writer = CheckpointWriter(session.recipe.run.checkpoint_async)
        self._saved: int | None = None  # the iterations done at the checkpoint that was read or written last

    def __enter__(self) -> CheckpointKeeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.__exit__(kind, error, at)

    def restore(self, chosen: bool = False) -> int:
        """Go on from the session's checkpoint; returns the iterations done, 0 without any checkpoint.

        Newer ones are set aside: they are damaged, unless this one was ``chosen``. Raises CheckpointError.
        """
        session, path = self._session, self._session.checkpoint
        if path is None:
            log.warning("no checkpoint in %s: starting from the beginning", session.output.root)
            return 0
        done = load_checkpoint(path, session.trained, session.recipe)
        self._saved = done
        if session.accelerator.is_main_process:
            with writing(session.output.checkpoints):
                moved = set_aside(session.output.ledger, session.output.checkpoints, path, LATER if chosen else DAMAGED)
            for aside in moved:
                what = "later" if chosen else "damaged"
                log.warning("going on from iteration %d; the %s checkpoint is now %s", done, what, aside)
        return done

    def save(self, done: int) -> None:
        """Save what was learnt, unless the last checkpoint holds just that. All processes must call this.

        Raises OutputError, on the main process, which writes.
        """
        self._writer.wait()  # before the copy: there is never more than one
        if done == self._saved:
            return
        session, recipe = self._session, self._session.recipe
        standing = position(recipe, session.inputs.schedule, session.order, done)
        main = session.accelerator.is_main_process
        contents = session.inputs.contents if main else {}
        copied = recipe.run.checkpoint_async
        snapshot = take_snapshot(session.trained, done, recipe, standing, copied, contents)
        if not main:
            self._saved = done
            return

        def write() -> None:
            output = session.output
            with writing(output.root):
                output.sync_logs()
            keep = recipe.run.keep_checkpoints
            write_checkpoint(output.ledger, output.checkpoints, snapshot, session.inputs.model, keep)
            self._saved = done

        self._writer.put(write)

    def check(self) -> None:
        """Raise what a write in the background raised that has ended since."""
        self._writer.check()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the write raised."""
        self._writer.wait()

    def kept(self, remedy: str, flags: str = "", good: str = "") -> str:
        """What a failure leaves of the run, and how to go on once the ``remedy`` is applied."""
        output = self._session.output
        checkpoints = list_checkpoints(output.checkpoints)
        if checkpoints:
            return f"The {good}checkpoint {checkpoints[-1]} is kept: {remedy}, go on with --resume{flags}"
        again = "begin again with --resume" if (output.root / METRICS).exists() else "begin again"
        return f"No checkpoint was written before: {remedy}, {again}"
