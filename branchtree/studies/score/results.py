"""What scoring says of each file, as values and as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchtree.core.scores import Scores
from branchtree.errors import OutputError
from branchtree.files.reading import require_name, whole_text
from branchtree.files.writing import write_atomically


@dataclass(frozen=True)
class FileScore:
    """One reward's verdict on one file. Numbers are the float32 ones, exactly; None stands for one there is not."""

    value: float | None  # what training would use; None if not valid
    raw: float | None  # the published model's own number, where ``value`` is a transform of it
    valid: bool
    reason: str | None = None  # why it is not valid
    details: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredFile:
    """A file, what it was asked to show, and its scores by the rewards' labels."""

    file: str  # as it was given; from a .jsonl, with the folder of that
    kind: str  # "image" or "video"
    prompt: str
    metadata: Mapping[str, Any]
    scores: Mapping[str, FileScore]


def file_scores(scores: Scores) -> list[FileScore]:
    """Each sample's part of a reward's scores."""
    return [_file_score(scores, row) for row in range(len(scores))]


def _file_score(scores: Scores, row: int) -> FileScore:
    valid = bool(scores.valid[row])
    return FileScore(
        value=_number(scores.values[row]) if valid else None,
        raw=_number(scores.raw[row]) if valid and scores.raw is not None else None,
        valid=valid,
        reason=None if valid else whole_text(scores.reasons.get(row, "the reward gives no reason")),
        details={name: _number(figure[row]) for name, figure in scores.details.items()},
    )


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def check_output(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse, before the work is done, a file that cannot be written or that is itself an input. Raises OutputError."""
    require_name(output, OutputError)
    if os.path.isdir(output):
        raise OutputError(f"output '{output}' is a folder; name a file in it, for example {output / 'scores.jsonl'}")
    if os.path.realpath(output) in {os.path.realpath(path) for path in inputs}:
        raise OutputError(f"output '{output}' would replace a file that is to be read; give it another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output '{output}': its folder cannot be made: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise OutputError(f"output '{output}': its folder cannot be written to")


def write_jsonl(output: Path, scored: Sequence[ScoredFile]) -> None:
    """One JSON object a line for each file, all of them or none. Raises OutputError."""
    lines = [json.dumps(asdict(one), ensure_ascii=False, allow_nan=False) + "\n" for one in scored]
    try:
        write_atomically(output, "".join(lines).encode())
    except OSError as error:
        raise OutputError(f"output '{output}' cannot be written: {error.strerror}") from None
