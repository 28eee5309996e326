"""The run directory: what is written where, and how it stays whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, OutputError
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import write_yaml

METRICS, TIMING, EVALUATION = "metrics.jsonl", "timing.jsonl", "evaluation.jsonl"
LIMITS = "limits.json"  # the batch limits that memory set


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

    def claim(self, resume: bool) -> None:
        """Make the directory, or check the one to resume. Raises OutputError or CheckpointError before work is done."""
        if resume and not self.recipe_file.is_file():
            raise CheckpointError(f"{self.root}: holds no run to resume; leave out --resume to start one")
        if not resume and self.recipe_file.exists():
            raise OutputError(
                f"{self.root}: already holds a run; continue it with --resume, or choose another --output"
            )
        probe = self.root / ".writable"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written: {error.strerror}; choose another --output") from None

    def discard_untrained(self) -> None:
        """Take back what a run wrote that failed before its first iteration was done."""
        if (self.root / METRICS).exists() or self.checkpoints.exists():
            return
        for name in (self.recipe_file.name, EVALUATION, LIMITS):
            (self.root / name).unlink(missing_ok=True)
        for name in ("samples", "trees", "trackers"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        if not any(self.root.iterdir()):
            self.root.rmdir()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe; reading it back gives the same recipe."""
        write_atomically(self.recipe_file, write_yaml(recipe.model_dump(mode="json")).encode())

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file."""
        with (self.root / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a .jsonl file; one that a crash cut off is left out."""
        path = self.root / name
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, iteration: int) -> None:
        """Forget what was logged at or after an iteration that will be done again.

        From the very beginning, the evaluation before training is done again too.
        """
        evaluated = iteration if iteration else -1
        for name, last in ((METRICS, iteration - 1), (TIMING, iteration - 1), (EVALUATION, evaluated)):
            kept = [row for row in self.rows(name) if row["iteration"] <= last]
            if (self.root / name).exists():
                write_atomically(self.root / name, "".join(json.dumps(row) + "\n" for row in kept).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: under a temporary name, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, sync it, then rename it over whatever stood there."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    _sync(temporary.rglob("*"))
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
    _sync([path.parent])


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
