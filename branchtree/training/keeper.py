"""A run's checkpoints as the training loop uses them: going on from one, writing others, saying what is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from branchtree.core.schedule import Schedule, SlidingWindow
from branchtree.data.prompts import PromptOrder
from branchtree.files.writing import writing
from branchtree.recipe.schema import Recipe
from branchtree.run.checkpoint import DAMAGED, LATER, list_checkpoints, set_aside, write_checkpoint
from branchtree.run.directory import METRICS
from branchtree.training.session import Session
from branchtree.training.trained import load_checkpoint, take_snapshot

log = logging.getLogger("branchtree")


class CheckpointWriter:
    """Does one write after the other. In the background, training goes on meanwhile and learns of a failure later.

    Used as a context, it is left only when nothing is being written, unless the process is asked to stop at once.
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
        # A daemon, so that a process that is asked to stop at once does: what it leaves is a folder without its name.
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
        position = _position(recipe, session.inputs.schedule, session.order, done)
        main = session.accelerator.is_main_process
        contents = session.inputs.contents if main else {}
        copied = recipe.run.checkpoint_async
        snapshot = take_snapshot(session.trained, done, recipe, position, copied, contents)
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
        """Return what a failure leaves of the run, and how to go on once the ``remedy`` is applied."""
        output = self._session.output
        checkpoints = list_checkpoints(output.checkpoints)
        if checkpoints:
            return f"The {good}checkpoint {checkpoints[-1]} is kept: {remedy}, go on with --resume{flags}"
        again = "begin again with --resume" if (output.root / METRICS).exists() else "begin again"
        return f"No checkpoint was written before: {remedy}, {again}"


def _position(recipe: Recipe, schedule: Schedule, order: PromptOrder, iteration: int) -> dict[str, Any]:
    """Return where a run stands in its prompts and windows, for people who read a checkpoint's state.

    All of it follows from the iteration and the recipe, so nothing is read back from here.
    """
    ids = order.batch(iteration, recipe.batch.prompts)
    window = schedule.sde.steps(iteration) if isinstance(schedule.sde, SlidingWindow) else None
    return {
        "prompts_drawn": iteration * recipe.batch.prompts,
        "next_prompts": [order.index(prompt_id) for prompt_id in ids],
        "sde_window": None if window is None else list(window),
        "pruning_moves": iteration // recipe.pruning.every if recipe.pruning.kind == "depth" else None,
    }
