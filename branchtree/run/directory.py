"""The run directory: what is written where, and how it stays whole."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, OutputError
from branchtree.files.checksums import MANIFEST
from branchtree.files.writing import free_name, synchronise, write_atomically, writing
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import write_yaml
from branchtree.run.ledger import Ledger
from branchtree.run.lock import LOCK, sole_process
from branchtree.run.logs import lines_until, read_lines

log = logging.getLogger("branchtree")

METRICS, TIMING, EVALUATION = "metrics.jsonl", "timing.jsonl", "evaluation.jsonl"
FAILURES = "failures.jsonl"  # samples that could not be scored; there once one could not
SPREAD = "spread.jsonl"  # how far apart the leaves of each prompt lie
ALARMS = "alarms.jsonl"  # there once one was raised
LIMITS = "limits.json"  # the batch limits that memory set
SUMMARY = "summary.json"
SAMPLES, TREES, TRACKERS = "samples", "trees", "trackers"
LOGS = (METRICS, TIMING, EVALUATION, FAILURES, SPREAD, ALARMS)
CHECKPOINT = re.compile(r"iteration_\d{6,}")
"""How the folder of a checkpoint is called."""
UNCOUNTED = frozenset({LOCK, "lost+found", ".DS_Store"})
"""What a folder may hold and still be empty: the lock of a process that starts, and what systems put everywhere."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run's directory, and the ways of writing to them."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model, as its own library reads it."""
        return self.root / "final"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @cached_property
    def ledger(self) -> Ledger:
        """What this process, and its run before it, wrote here."""
        return Ledger(self.root)

    @property
    def holds_run(self) -> bool:
        """Return whether a run was begun here: there is a recipe, and not one that a user keeps here."""
        return self.recipe_file.is_file() and (self.ledger.exists or any(self.checkpoints.glob(f"*/{MANIFEST}")))

    def require_usable(self, resume: bool) -> None:
        """Look for the run to resume, or for what is in the way. Raises CheckpointError or OutputError."""
        if resume:
            if not self.holds_run:
                raise CheckpointError(f"{self.root}: holds no run to resume; leave out --resume to start one")
            return
        if self.holds_run:
            raise OutputError(
                f"{self.root}: already holds a run; continue it with --resume, or choose another --output"
            )
        self._require_empty()

    def _require_empty(self) -> None:
        """Raises OutputError if the directory holds files of someone else, naming one of them."""
        if self.holds_run or self.ledger.exists:
            return
        try:
            found = sorted(path for path in self.root.iterdir() if path.name not in UNCOUNTED)
            files = (file for path in found for file in [path, *path.rglob("*")] if file.is_file())
            shown = next(files, next(iter(found), None))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be read: {error.strerror}; choose another --output") from None
        if shown is not None:
            raise OutputError(
                f"{self.root}: is not empty, and holds no run: there is {shown}; choose another --output, or an empty "
                "folder"
            )

    def claim(self, resume: bool) -> None:
        """Make the directory, or check the one to resume. Raises OutputError or CheckpointError before work is done."""
        self.require_usable(resume)
        try:
            self.ledger.make(self.root)
            self.ledger.open(self._whole_checkpoints)
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written: {error.strerror}; choose another --output") from None
        if resume:
            self._require_own()

    def _whole_checkpoints(self) -> list[Path]:
        return [manifest.parent for manifest in self.checkpoints.glob(f"iteration_*/{MANIFEST}")]

    def _require_own(self) -> None:
        """Raises OutputError if something stands where the run would write its model or a checkpoint."""
        self.ledger.require_own(self.final)
        for path in sorted(self.checkpoints.glob("iteration_*")):
            if CHECKPOINT.fullmatch(path.name) and not self.ledger.owns(path) and not (path / MANIFEST).is_file():
                raise OutputError(
                    f"{path}: was not written by this run, which may write a checkpoint of that name; move it out of "
                    f"{self.checkpoints}"
                )

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """A block in which this process alone writes here. Raises OutputError or CheckpointError before work is done.

        The message names the process that is writing here already. A directory that was made for it and stays empty is
        not left behind.
        """
        if resume:
            self.require_usable(resume)
        self._require_empty()  # before even the lock's file is written here
        try:
            with suppress(OSError):  # the lock reports it
                self.ledger.make(self.root)
            with sole_process(self.root):
                self.claim(resume)
                yield
        finally:
            self.ledger.remove_empty()

    @contextmanager
    def writing(self, name: str, growing: bool = False) -> Iterator[None]:
        """A block that writes a file or folder of that name. Raises OutputError if the disk refuses.

        Until something is learnt, what appears there is remembered, for a run that fails takes it back; see
        ``Ledger.noting`` for ``growing``.
        """
        path = self.root / name
        begun = self.ledger.noting(path, growing) if self._is_untrained else nullcontext()
        with writing(path), begun:
            yield

    @property
    def _is_untrained(self) -> bool:
        return not (self.root / METRICS).exists() and not self.checkpoints.exists()

    def discard_untrained(self) -> None:
        """Take back what this process wrote, if it failed before the run's first iteration was done."""
        if self._is_untrained:
            self.ledger.take_back()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe; reading it back gives the same recipe. Raises OutputError."""
        with self.writing(self.recipe_file.name):
            write_atomically(self.recipe_file, write_yaml(recipe.model_dump(mode="json")).encode())

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file. Raises OutputError; what there is of the line then is dropped on resume."""
        with self.writing(name), (self.root / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync_logs(self) -> None:
        """Flush the .jsonl files to the disk: a checkpoint must not outlive the lines that were written before it."""
        synchronise(path for path in (self.root / name for name in LOGS) if path.is_file())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a .jsonl file; a line that a crash cut off is left out, and a damaged one too, with a warning."""
        lines = read_lines(self.root / name)
        for line in lines:
            if line.problem:
                log.warning("%s:%d is damaged and left out: %s", self.root / name, line.number, line.problem)
        return [line.row for line in lines if line.row is not None]

    def evaluated(self, iteration: int, identity: Mapping[str, Any] | None) -> bool:
        """Return whether held-out figures of that identity were written after ``iteration`` iterations."""
        return any(row["iteration"] == iteration and row.get("identity") == identity for row in self.rows(EVALUATION))

    def rewind(self, iteration: int) -> None:
        """Forget what was logged at or after an iteration that will be done again. Raises OutputError.

        From the very beginning, the evaluation before training is done again too. A file with a damaged line is kept
        under another name, and the run goes on without that line.
        """
        evaluated = iteration if iteration else -1
        for name in LOGS:
            last = evaluated if name == EVALUATION else iteration - 1
            path = self.root / name
            if not path.exists():
                continue
            kept, damaged = lines_until(read_lines(path), last)
            with writing(path):
                if damaged:
                    copy = free_name(path.with_name(f"{path.name}.damaged"))
                    write_atomically(copy, path.read_bytes())
                    for line in damaged:
                        log.warning(
                            "%s:%d is damaged and left out (%s); the file as it was is now %s. The iteration's figures "
                            "are lost, and nothing that was learnt; with a good copy of the line, put it back",
                            path,
                            line.number,
                            line.problem,
                            copy,
                        )
                write_atomically(path, b"".join(line.content for line in kept))
