"""Batches that shrink when memory runs out, and stay so for the rest of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from branchtree.errors import DeviceMemoryError
from branchtree.files.writing import write_atomically
from branchtree.recipe.schema import BatchSection
from branchtree.run.directory import LIMITS, RunDirectory

log = logging.getLogger("branchtree")

Result = TypeVar("Result")

_REMEDIES = {
    "batch.rollout_rows": "use run.precision: bf16 or lora, keep batch.states on the host, or make samples smaller",
    "batch.update_rows": "use run.gradient_checkpointing, run.precision: bf16 or lora, or make samples smaller",
    "batch.decode_rows": "make samples smaller, or have rewards leave the device between their calls (offload)",
    "evaluation.rows": "use run.precision: bf16 or lora, or make samples smaller",
}
REWARD_REMEDY = "set the reward's own batch or offload, or score on another machine (reward: remote)"


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device's memory, or the host's, is full."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and bool(should_reduce_batch_size(error))
    )


class RowLimit:
    """How many rows are worked on at once under one recipe key: all where ``rows`` is None; fewer once memory ran out.

    ``fixed`` limits do not shrink, and running out of memory is an error at once: so it must be where each process
    would have to shrink at the same moment.
    """

    def __init__(self, key: str, rows: int | None, fixed: bool = False) -> None:
        self.key = key
        self.rows = rows
        self._fixed = fixed
        self.found = False  # whether memory ran out under it, in this run or before it was resumed

    def each(self, rows: int, work: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """Yield consecutive slices of some rows, and what the work makes of each; one that does not fit is cut again.

        The work must leave nothing behind if it fails. Raises DeviceMemoryError if one row does not fit.
        """
        start = 0
        while start < rows:
            span = slice(start, min(start + (self.rows or rows), rows))
            try:
                result = work(span)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                reason = str(error)
            else:
                yield span, result
                start = span.stop
                continue
            # Only past the handler are the frames gone that hold what the failed work had allocated.
            self.shrink(span.stop - span.start, reason)

    def shrink(self, rows: int, reason: str) -> None:
        """Take half as many rows as those that did not fit. Raises DeviceMemoryError if that cannot be."""
        if self._fixed:
            self.refuse(rows, reason)
        if rows <= 1:
            remedy = _REMEDIES.get(self.key, REWARD_REMEDY)
            raise DeviceMemoryError(
                f"{self.key}: memory ran out with one row at a time; {remedy}. {first_line(reason)}"
            )
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        log.warning(
            "%s: memory ran out with %d rows at once; from here on it is %d. Set it to that to be spared the attempt.",
            self.key,
            rows,
            rows // 2,
        )
        self.lower(rows // 2)

    def refuse(self, rows: int, reason: str) -> NoReturn:
        """Raise DeviceMemoryError: some rows did not fit where no process can begin again alone."""
        raise DeviceMemoryError(
            f"{self.key}: memory ran out with {rows} rows at once, in a step that all processes take together; "
            f"set {self.key} to less than {rows}. {first_line(reason)}"
        )

    def lower(self, rows: int) -> None:
        """Take at most ``rows``, as was found before or elsewhere."""
        self.rows = rows if self.rows is None else min(self.rows, rows)
        self.found = True


class RowLimits:
    """The limits of one run: those of its recipe, until memory runs out.

    ``sharded`` says that every forward of the denoiser is one that all processes take together.
    """

    def __init__(self, batch: BatchSection, evaluation_rows: int | None, sharded: bool = False) -> None:
        self.rollout = RowLimit("batch.rollout_rows", batch.rollout_rows, sharded)
        self.update = RowLimit("batch.update_rows", batch.update_rows, sharded)
        self.decode = RowLimit("batch.decode_rows", batch.decode_rows)
        self.evaluation = RowLimit("evaluation.rows", evaluation_rows, sharded)
        own = (self.rollout, self.update, self.decode, self.evaluation)
        self._all = {limit.key: limit for limit in own}

    def reward(self, label: str) -> RowLimit:
        """Return the limit of one reward: samples that it is given at once."""
        key = f"rewards.{label}"
        return self._all.setdefault(key, RowLimit(key, None))

    def start_at(self, rows: Mapping[str, int]) -> None:
        """Begin with an estimate under the keys that the recipe leaves open."""
        for key, estimate in rows.items():
            limit = self._all[key]
            limit.rows = estimate if limit.rows is None else limit.rows

    @property
    def found(self) -> dict[str, int]:
        """The limits that memory set, by key."""
        return {key: limit.rows for key, limit in self._all.items() if limit.found and limit.rows is not None}

    def recall(self, output: RunDirectory) -> None:
        """Take over what the run had found before it stopped."""
        self._lower(_read(output.root / LIMITS))

    def agree(self, accelerator: Any, output: RunDirectory) -> None:
        """Agree on the smallest limits of all processes, between iterations, and keep new ones on disk."""
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            for found in gather_object([self.found]):
                self._lower(found)
        found, file = self.found, output.root / LIMITS
        if found and accelerator.is_main_process and found != _read(file):
            with output.writing(LIMITS):
                write_atomically(file, json.dumps(found).encode())

    def _lower(self, found: Mapping[str, int]) -> None:
        for key, rows in found.items():
            limit = self._all.get(key) or self.reward(key.removeprefix("rewards."))
            limit.lower(rows)


def first_line(text: str) -> str:
    """A library's message without what follows its first line."""
    return text.strip().partition("\n")[0]


def _read(file: Path) -> dict[str, int]:
    """The limits in a file; none where it is missing or damaged, for they are found again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): int(rows) for key, rows in found.items() if int(rows) >= 1}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return {}
