"""Runs that are still to be done: one after the other in this process, or several processes at a time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from types import FrameType
from typing import Literal

from branchtree.errors import BranchTreeError, OutputError
from branchtree.files.json_lines import read_json_object
from branchtree.run.directory import RunDirectory
from branchtree.studies.compare.meter import CpuMeter
from branchtree.studies.compare.runs import PlannedRun
from branchtree.training.interrupt import StopRequest


@dataclass(frozen=True)
class RunOutcome:
    """How an attempt at a run ended."""

    status: Literal["finished", "failed", "stopped"]
    message: str = ""


KILLED = "its process was killed, perhaps for want of memory"

Tell = Callable[[PlannedRun, RunOutcome], None]


def is_finished(run: PlannedRun) -> bool:
    """Whether a run is done. Raises OutputError if it was done for another number of iterations."""
    path = run.folder / "summary.json"
    if not path.is_file():
        return False
    try:
        iterations = read_json_object(path, OutputError)["iterations"]
    except (OutputError, KeyError):
        return False  # going on from the last checkpoint writes it again
    if iterations != run.recipe.run.iterations:
        raise OutputError(
            f"{run.folder}: holds a run of {iterations} iterations, not of {run.recipe.run.iterations}; delete it, or "
            "choose another --output"
        )
    return True


def perform(run: PlannedRun) -> RunOutcome:
    """Do a run, or go on with it where it has begun."""
    from branchtree.run.start import with_start
    from branchtree.training.trainer import train_recipe

    meter, directory = CpuMeter(), RunDirectory(run.folder)
    resume = directory.recipe_file.is_file()
    try:
        begun = with_start(run.recipe, None, directory if resume else None)
        result = train_recipe(begun, run.folder, resume, [meter])
    except BranchTreeError as error:
        return RunOutcome("failed", str(error))
    meter.close(result.iterations)
    return RunOutcome("finished" if result.finished else "stopped")


def perform_all(runs: Sequence[PlannedRun], jobs: int, tell: Tell) -> None:
    """Do all runs, ``jobs`` at a time, and tell how each ended. A failed one does not keep the others from going on.

    Asked to stop by a signal, the runs under way end with a checkpoint and no other begins.
    """
    if jobs == 1:
        for run in runs:
            outcome = perform(run)
            tell(run, outcome)
            if outcome.status == "stopped":
                return
        return
    waiting: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    lanes = min(jobs, len(runs))
    lock = threading.Lock()

    def tell_one(run: PlannedRun, outcome: RunOutcome) -> None:
        with lock:
            tell(run, outcome)

    with StopRequest() as stop, _terminating(stop), ThreadPoolExecutor(max(lanes, 1)) as pool:
        for lane in [pool.submit(_lane, waiting, _threads_each(jobs), stop, tell_one) for _ in range(lanes)]:
            lane.result()


def _lane(waiting: queue.SimpleQueue[PlannedRun], threads: int, stop: StopRequest, tell: Tell) -> None:
    """Give run after run to a process of its own; one that dies takes only its run with it."""
    process: ProcessPoolExecutor | None = None
    try:
        while not stop.requested:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            process = process or _one_process(threads)
            try:
                outcome = process.submit(perform, run).result()
            except BrokenProcessPool:
                process.shutdown()
                process = None
                outcome = RunOutcome("stopped") if stop.requested else RunOutcome("failed", KILLED)
            tell(run, outcome)
            if outcome.status == "stopped":
                return
    finally:
        if process is not None:
            process.shutdown()


@contextmanager
def _terminating(stop: StopRequest) -> Iterator[None]:
    """Hand SIGTERM on to the processes: unlike Ctrl-C in a terminal, it reaches this one alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for child in multiprocessing.active_children():
            child.terminate()

    previous = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _one_process(threads: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (threads,))


def _prepare(threads: int) -> None:
    """In a new process: keep to its part of the cores, and do not outlive the comparison."""
    import torch

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this process when another has ended, at once: a run that is cut off can go on, two at once cannot."""
    connection.wait([sentinel])
    os._exit(1)


def _threads_each(jobs: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    most = int(wanted) if wanted.isdecimal() and int(wanted) else cores
    return max(min(cores // jobs, most), 1)
