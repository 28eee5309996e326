"""Processor time of a run, kept beside its other records so that it outlives an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from branchtree.files.writing import write_atomically
from branchtree.plugins.base import Callback
from branchtree.run.directory import RunDirectory

CPU = "cpu.jsonl"


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
    """The processor time of a run, or None where it was not recorded."""
    rows = RunDirectory(folder).rows(CPU)
    return float(sum(row.get("seconds", 0.0) for row in rows)) if rows else None
