"""A run directory as data. What a run in progress, or one that was killed, has not written is absent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from branchtree.errors import OutputError
from branchtree.files.reading import read_text, require_name
from branchtree.recipe.plain_yaml import NotPlainError, read_plain
from branchtree.run.directory import (
    ALARMS,
    EVALUATION,
    FAILURES,
    METRICS,
    SAMPLES,
    SUMMARY,
    TIMING,
    TREES,
    RunDirectory,
)
from branchtree.run.lock import writer

LogRow = Mapping[str, float | None]
"""One iteration's figures by name; None where a figure is missing or not finite."""

Number = Annotated[float | None, AfterValidator(lambda value: None if value is None else finite(value))]


class Record(BaseModel):
    """A record in a run's files; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)


class LoggedFigure(Record):
    """A held-out figure: the mean over the valid samples."""

    mean: Number = None
    valid: int | None = None
    samples: int | None = None


class Evaluation(Record):
    """The held-out figures by label after ``iteration`` iterations; 0 is before training."""

    iteration: int
    identity: dict[str, Any] | None = None  # what they depend on besides the weights
    figures: dict[str, LoggedFigure] = {}

    def mean(self, label: str) -> float | None:
        """Return the mean of a label; None where it was not evaluated or has no valid sample."""
        return self.figures.get(label, LoggedFigure()).mean


class LoggedFailure(Record):
    """A sample that a reward could not score; or ``more`` of them, by reason; or, without a reward, a failed call."""

    iteration: int
    prompt: str = ""
    leaf: int | None = None
    reward: str = ""
    reason: str = ""
    more: int | None = None
    reasons: dict[str, int] = {}


class LoggedAlarm(Record):
    """An alarm at its onset, after ``iteration`` was done."""

    iteration: int
    message: str


class SampleGrid(Record):
    """A picture of samples, one per prompt: images in rows of ``columns``, or a strip of frames for each video.

    Videos also have a file in which all of them play, in rows of ``columns``.
    """

    iteration: int
    prompts: tuple[str, ...] = ()
    columns: int = 8
    kind: Literal["image", "video"] = "image"
    fps: Number = None
    frames: int | None = None  # of a video
    strip: tuple[int, ...] = ()  # the frames that a strip shows
    image: Path = Path()


class Node(Record):
    """A node of a recorded tree; ``trained`` and ``stochastic`` are about the edge into it."""

    id: int
    depth: int = Field(ge=0)
    parent: int | None = None
    value: Number = None
    advantage: Number = None
    trained: bool = True
    stochastic: bool = True


class Leaf(Record):
    """The rewards of a recorded tree's leaf, and its picture, relative to the folder of trees."""

    node: int
    rewards: dict[str, Number] = {}
    valid: bool = True
    thumbnail: str | None = None


class Tree(Record):
    """A recorded tree of one prompt."""

    iteration: int
    prompt: str = ""
    splits: tuple[int, ...] = ()
    nodes: tuple[Node, ...] = Field(min_length=1)
    leaves: tuple[Leaf, ...] = ()

    @model_validator(mode="after")
    def _connected(self) -> Tree:
        depth = {node.id: node.depth for node in self.nodes}
        if len(depth) != len(self.nodes):
            raise ValueError("two nodes have the same id")
        for node in self.nodes:
            above = -1 if node.parent is None else depth.get(node.parent)
            if above is None or node.depth != above + 1:
                raise ValueError(f"node {node.id} does not lie one step below its parent")
        if any(leaf.node not in depth for leaf in self.leaves):
            raise ValueError("a leaf names a node that is not there")
        return self


@dataclass(frozen=True)
class Run:
    """The files of a run."""

    path: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    metrics: Sequence[LogRow]
    timing: Sequence[LogRow]
    evaluations: Sequence[Evaluation]
    samples: Sequence[SampleGrid]
    trees: Sequence[Tree]
    summary: Mapping[str, Any] | None
    failures: Sequence[LoggedFailure] = ()
    alarms: Sequence[LoggedAlarm] = ()
    writer: str | None = None  # the process that trains it now
    notes: list[str] = field(default_factory=list)  # about what could not be read

    @property
    def done(self) -> int:
        """Iterations that finished."""
        last = self.metrics[-1]["iteration"] if self.metrics else None
        return 0 if last is None else int(last) + 1

    @property
    def planned(self) -> int | None:
        """Iterations that the recipe asks for."""
        iterations = self.setting("run", "iterations")
        return iterations if isinstance(iterations, int) else None

    @property
    def state(self) -> Literal["running", "finished", "stopped"]:
        """Whether a process trains it now, all iterations are done, or neither."""
        if self.writer:
            return "running"
        return "stopped" if self.summary is None else "finished"

    def setting(self, *keys: str) -> Any:
        """Return a value of the recipe, or None."""
        value: Any = self.recipe
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def finite(value: Any) -> float | None:
    """Return a finite number, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_run(path: Path) -> Run:
    """Read a run directory. Raises OutputError if it is not one."""
    require_name(path, OutputError)
    recipe_file = RunDirectory(path).recipe_file
    for file in (recipe_file, path / METRICS):
        if not file.is_file():
            raise OutputError(
                f"{path}: is not a run directory, it holds no {file.name}; give the directory that 'branchtree train' "
                "writes to, once its first iteration is done"
            )
    notes: list[str] = []
    text, recipe = _recipe(recipe_file)
    return Run(
        path=path,
        recipe=recipe,
        recipe_text=text,
        metrics=_with_totals(_rows(path / METRICS, notes)),
        timing=_rows(path / TIMING, notes),
        evaluations=_evaluations(path / EVALUATION, notes),
        samples=_samples(path / SAMPLES, notes),
        trees=_trees(path / TREES, notes),
        summary=_summary(path / SUMMARY, notes),
        failures=_records(LoggedFailure, path / FAILURES, notes),
        alarms=_records(LoggedAlarm, path / ALARMS, notes),
        writer=writer(path),
        notes=notes,
    )


def _with_totals(metrics: Sequence[LogRow]) -> list[LogRow]:
    """Add ``rows/total``, the row equivalents so far; None from the first row without the figure on."""
    spent: float | None = 0.0
    rows: list[LogRow] = []
    for row in metrics:
        more = row.get("rows/equivalent")
        spent = None if spent is None or more is None else spent + more
        rows.append({**row, "rows/total": spent})
    return rows


def _recipe(path: Path) -> tuple[str, Mapping[str, Any]]:
    try:
        text = read_text(path, OutputError)
        recipe = read_plain(text).data
    except OutputError as error:
        raise OutputError(f"{error}; restore the recipe that the run wrote") from None
    except NotPlainError as error:
        reason = f"line {error.line}: {error}"
        raise OutputError(f"{path}: cannot be read: {reason}; restore the recipe that the run wrote") from None
    if not isinstance(recipe, dict):
        raise OutputError(f"{path}: is not a recipe, it holds no keys; restore the recipe that the run wrote")
    return text, recipe


def _objects(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file that have an iteration, in order."""
    if not path.is_file():
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return []
    rows: list[dict[str, Any]] = []
    skipped: list[int] = []
    for number, line in enumerate(lines, 1):
        row = _json(line)
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            rows.append(row)
        else:
            skipped.append(number)
    if skipped == [len(lines)]:
        notes.append(f"The last line of {path.name} is incomplete and was left out.")
    elif skipped:
        notes.append(f"{len(skipped)} unreadable lines of {path.name} were left out.")
    return rows


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file by iteration; for an iteration that was repeated, the last one.

    Objects with another identity than the last one are left out.
    """
    rows = _objects(path, notes)
    alike = [row for row in rows if row.get("identity") == rows[-1].get("identity")]
    if len(alike) < len(rows):
        other = len(rows) - len(alike)
        notes.append(f"{other} lines of {path.name} are of other prompts or rewards than the last: they were left out.")
    found = {row["iteration"]: row for row in alike}
    return [found[iteration] for iteration in sorted(found)]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _document(path: Path) -> Any:
    """Return a .json file's content, or None."""
    try:
        return _json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def _rows(path: Path, notes: list[str]) -> list[LogRow]:
    return [{key: finite(value) for key, value in row.items()} for row in _lines(path, notes)]


Valid = TypeVar("Valid", bound=Record)


def _records(kind: type[Valid], path: Path, notes: list[str]) -> list[Valid]:
    return _validated(kind, _objects(path, notes), f"A line of iteration {{}} in {path.name} was left out", notes)


def _evaluations(path: Path, notes: list[str]) -> list[Evaluation]:
    what = f"The figures of iteration {{}} in {path.name} were left out"
    return _validated(Evaluation, _lines(path, notes), what, notes)


def _validated(kind: type[Valid], rows: Sequence[dict[str, Any]], left_out: str, notes: list[str]) -> list[Valid]:
    """Return the rows that are valid as ``kind``; add a note, ``left_out`` with its iteration, for each other row."""
    found = []
    for row in rows:
        try:
            found.append(kind.model_validate(row))
        except ValidationError:
            notes.append(f"{left_out.format(row['iteration'])}: not as expected.")
    return found


def _samples(folder: Path, notes: list[str]) -> list[SampleGrid]:
    grids = []
    for path in sorted(folder.glob("iteration_*.json")):
        try:
            grid = SampleGrid.model_validate(_document(path))
        except ValidationError:
            notes.append(f"{SAMPLES}/{path.name} cannot be read and was left out.")
            continue
        image = path.with_suffix(".png")
        if image.is_file():
            grids.append(grid.model_copy(update={"image": image}))
    return sorted(grids, key=lambda grid: grid.iteration)


def _trees(folder: Path, notes: list[str]) -> list[Tree]:
    trees = []
    for path in sorted(folder.glob("iteration_*.json")):
        try:
            trees.append(Tree.model_validate(_document(path)))
        except ValidationError:
            notes.append(f"{TREES}/{path.name} cannot be read and was left out.")
    return sorted(trees, key=lambda tree: tree.iteration)


def _summary(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    summary = _document(path)
    if isinstance(summary, dict):
        return summary
    notes.append(f"{path.name} cannot be read and was left out.")
    return None
