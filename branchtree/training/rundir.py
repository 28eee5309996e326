"""The run directory: what is written where, and how it stays whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, OutputError
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import write_yaml
from branchtree.training.disk import writing
from branchtree.training.lock import sole_process

METRICS, TIMING, EVALUATION = "metrics.jsonl", "timing.jsonl", "evaluation.jsonl"
LIMITS = "limits.json"  # the batch limits that memory set
LOGS = (METRICS, TIMING, EVALUATION)


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

    def require_usable(self, resume: bool) -> None:
        """Look for the run to resume, or for one that is in the way. Raises CheckpointError or OutputError."""
        if resume and not self.recipe_file.is_file():
            raise CheckpointError(f"{self.root}: holds no run to resume; leave out --resume to start one")
        if not resume and self.recipe_file.exists():
            raise OutputError(
                f"{self.root}: already holds a run; continue it with --resume, or choose another --output"
            )

    def claim(self, resume: bool) -> None:
        """Make the directory, or check the one to resume. Raises OutputError or CheckpointError before work is done."""
        self.require_usable(resume)
        probe = self.root / ".writable"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written: {error.strerror}; choose another --output") from None

    @contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """A block in which this process alone writes here. Raises OutputError or CheckpointError before work is done.

        The message names the process that is writing here already. An empty directory is not left behind.
        """
        if not self.root.exists():
            self.require_usable(resume)
        try:
            with sole_process(self.root):
                self.claim(resume)
                yield
        finally:
            self.discard_empty()

    def discard_untrained(self) -> None:
        """Take back what a run wrote that failed before its first iteration was done."""
        if (self.root / METRICS).exists() or self.checkpoints.exists():
            return
        for name in (self.recipe_file.name, EVALUATION, LIMITS):
            (self.root / name).unlink(missing_ok=True)
        for name in ("samples", "trees", "trackers"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def discard_empty(self) -> None:
        """Remove the directory if nothing is in it."""
        with suppress(OSError):
            self.root.rmdir()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe; reading it back gives the same recipe. Raises OutputError."""
        with writing(self.recipe_file):
            write_atomically(self.recipe_file, write_yaml(recipe.model_dump(mode="json")).encode())

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file. Raises OutputError; what there is of the line then is dropped on resume."""
        with writing(self.root / name), (self.root / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync_logs(self) -> None:
        """Have the .jsonl files on the disk: a checkpoint must not outlive the lines that were written before it."""
        _sync(path for path in (self.root / name for name in LOGS) if path.is_file())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a .jsonl file; one that a crash cut off is left out."""
        return [json.loads(line) for line in self._lines(name)]

    def evaluated(self, iteration: int, identity: Mapping[str, Any] | None) -> bool:
        """Whether held-out figures of that identity were written after ``iteration`` iterations."""
        return any(row["iteration"] == iteration and row.get("identity") == identity for row in self.rows(EVALUATION))

    def _lines(self, name: str) -> list[str]:
        """Those lines, with their ends, as they were written."""
        path = self.root / name
        if not path.is_file():
            return []
        # A crash can cut a line anywhere, also inside a character.
        lines = path.read_bytes().splitlines(keepends=True)
        return [line.decode() for line in lines if line.endswith(b"\n")]

    def rewind(self, iteration: int) -> None:
        """Forget what was logged at or after an iteration that will be done again. Raises OutputError.

        From the very beginning, the evaluation before training is done again too.
        """
        evaluated = iteration if iteration else -1
        for name, last in zip(LOGS, (iteration - 1, iteration - 1, evaluated), strict=True):
            path = self.root / name
            if path.exists():
                kept = [line for line in self._lines(name) if json.loads(line)["iteration"] <= last]
                with writing(path):
                    write_atomically(path, "".join(kept).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: under a temporary name, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk, what there is of it is room that someone needs
        raise


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, sync it, then rename it; what stood there goes once it is in place."""
    temporary, before = (path.with_name(f".{path.name}.{part}") for part in ("partial", "before"))
    for leftover in (temporary, before):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        _sync([temporary, *temporary.rglob("*")])
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        path.rename(before)
    temporary.replace(path)
    _sync([path.parent])
    shutil.rmtree(before, ignore_errors=True)


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
