"""How far a study has come, and the files that it leaves behind: checked before the work is done, then written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from branchtree.errors import OutputError
from branchtree.files.reading import require_name
from branchtree.files.writing import require_own_results, write_atomically, writing

Advance = Callable[[int, int], None]
"""Called with how much of the work is done, and how much there is."""


def counter(advance: Advance | None, whole: int) -> Callable[[int], None]:
    """Return a function that adds to the work that is done, and reports it to ``advance``."""
    done = 0

    def add(more: int) -> None:
        nonlocal done
        done += more
        if advance is not None:
            advance(done, whole)

    return add


def check_folder(folder: Path, names: Sequence[str], marks: Mapping[str, Collection[str]]) -> None:
    """Refuse a folder that cannot be written to, or that holds somebody else's files under ``names``.

    See ``require_own_results`` for ``marks``. Raises OutputError.
    """
    check_file(folder / names[0])
    require_own_results(folder, names, marks)


def check_file(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file that cannot be written or that is itself an input. Raises OutputError."""
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


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file to be read by people too, whole or not at all. Raises OutputError."""
    with writing(path):
        write_atomically(path, f"{json.dumps(content, ensure_ascii=False, indent=2)}\n".encode())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, all of them or none. Raises OutputError."""
    with writing(path):
        write_atomically(path, as_lines(rows).encode())


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return one JSON object a line."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
