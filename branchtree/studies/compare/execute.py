"""Runs that are still to be done, and their processor time: one after the other here, or in several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from branchtree.errors import BranchTreeError, OutputError
from branchtree.files.json_lines import read_json_object
from branchtree.files.writing import write_atomically
from branchtree.plugins.base import Callback
from branchtree.run.directory import SUMMARY, RunDirectory
from branchtree.run.start import with_start
from branchtree.studies.compare.plan import PlannedRun
from branchtree.training.interrupt import StopRequest
from branchtree.training.trainer import train_recipe

CPU = "cpu.jsonl"  # kept beside a run's other records, so that it outlives an interruption
KILLED = "its process was killed, perhaps for want of memory"


@dataclass(frozen=True)
class RunOutcome:
    """How an attempt at a run ended, if there was one."""

    status: Literal["finished", "failed", "stopped", "waiting"]
    message: str = ""


Report = Callable[[PlannedRun, RunOutcome], None]


class CpuMeter(Callback):
    """Writes the seconds of all processors that this process used, a line for each iteration.

    An iteration's line also holds what came since the line before: evaluation, samples, checkpoints. Loading is not
    counted. A run that goes on forgets the lines of the iterations that it does again, so that work is counted once;
    what was spent after its last whole iteration before it was interrupted is lost.
    """

    def __init__(self) -> None:
        self._mark = 0.0
        self._output: Path | None = None

    def on_start(self, output: Path, iteration: int, iterations: int) -> None:
        """Keep the lines of the iterations that are done."""
        self._output, self._mark = output, time.process_time()
        if not (output / CPU).exists():
            return
        kept = [row for row in RunDirectory(output).rows(CPU) if row["iteration"] < iteration]
        write_atomically(output / CPU, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the iteration's line."""
        self._write(iteration)

    def close(self, iterations: int) -> None:
        """Write what came after the last iteration."""
        self._write(iterations)

    def _write(self, iteration: int) -> None:
        if self._output is not None:
            now = time.process_time()
            RunDirectory(self._output).append(CPU, {"iteration": iteration, "seconds": now - self._mark})
            self._mark = now


def cpu_seconds(folder: Path) -> float | None:
    """Return the processor time of a run, or None where it was not recorded."""
    rows = RunDirectory(folder).rows(CPU)
    return float(sum(row.get("seconds", 0.0) for row in rows)) if rows else None


def is_finished(run: PlannedRun) -> bool:
    """Return whether a run is done. Raises OutputError if it was done for another number of iterations."""
    path = run.folder / SUMMARY
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
    meter, directory = CpuMeter(), RunDirectory(run.folder)
    resume = directory.recipe_file.is_file()
    try:
        begun = with_start(run.recipe, None, directory if resume else None)
        result = train_recipe(begun, run.folder, resume, [meter])
    except BranchTreeError as error:
        return RunOutcome("failed", str(error))
    meter.close(result.iterations)
    return RunOutcome("finished" if result.finished else "stopped")


def perform_all(runs: Sequence[PlannedRun], jobs: int, report: Report) -> None:
    """Do all runs, ``jobs`` at a time, and report how each ended. A failed one does not keep the others from going on.

    Asked to stop by a signal, the runs under way end with a checkpoint and no other begins.
    """
    if jobs == 1:
        for run in runs:
            outcome = perform(run)
            report(run, outcome)
            if outcome.status == "stopped":
                return
        return
    lock, threads = threading.Lock(), _threads_each(jobs)

    def perform_one(run: PlannedRun) -> None:
        if not stop.requested:
            outcome = _perform_elsewhere(run, threads, stop)
            with lock:
                report(run, outcome)

    with StopRequest() as stop, _terminating(stop), ThreadPoolExecutor(jobs) as pool:
        list(pool.map(perform_one, runs))


def _perform_elsewhere(run: PlannedRun, threads: int, stop: StopRequest) -> RunOutcome:
    """Do a run in a process of its own, so that one that dies takes only its run with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (threads,)) as process:
        try:
            return process.submit(perform, run).result()
        except BrokenProcessPool:
            return RunOutcome("stopped") if stop.requested else RunOutcome("failed", KILLED)


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


def _prepare(threads: int) -> None:
    """Have a new process keep to its share of the cores, and not outlive the comparison."""
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
