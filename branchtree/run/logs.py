"""Lines of a run's .jsonl files, which a crash may have cut off and a disk or an editor may have damaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import DataError
from branchtree.files.json_lines import parse_json


@dataclass(frozen=True)
class Line:
    """A whole line of a file; either ``row`` or ``problem`` is there."""

    number: int  # from 1
    content: bytes  # with its end
    row: dict[str, Any] | None
    problem: str = ""

    @property
    def iteration(self) -> int | None:
        """The iteration that it is about, or None for a damaged line."""
        return None if self.row is None else int(self.row["iteration"])


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, in order; one without an end, which a crash cut off, is left out."""
    if not path.is_file():
        return []
    # A crash can cut a line anywhere, also inside a character.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_line(number, content) for number, content in enumerate(lines, start=1)]


def lines_until(lines: Sequence[Line], last: int) -> tuple[list[Line], list[Line]]:
    """The lines to keep, up to an iteration, and those among them that are damaged or out of order."""
    iterations = [line.iteration for line in lines]
    wanted = [i for i, iteration in enumerate(iterations) if iteration is not None and iteration <= last]
    kept = [lines[i] for i in wanted]
    end = wanted[-1] + 1 if wanted else 0
    if not kept or kept[-1].iteration != last:  # a damaged line that follows may be one of those wanted
        while end < len(lines) and lines[end].problem:
            end += 1
    damaged = [line for line in lines[:end] if line not in kept]
    out_of_order = "it is of iteration {}, and a later line of an earlier one"
    return kept, [
        Line(line.number, line.content, None, line.problem or out_of_order.format(line.iteration)) for line in damaged
    ]


def _line(number: int, content: bytes) -> Line:
    ended = content + b"\n"
    try:
        row = parse_json(content.decode("utf-8"), "")
    except ValueError as error:
        return Line(number, ended, None, f"not valid JSON: {str(error).splitlines()[0]}")
    except DataError as error:
        return Line(number, ended, None, str(error).removeprefix(": "))
    problem = _problem(row)
    return Line(number, ended, None if problem else row, problem)


def _problem(row: Any) -> str:
    """Return what keeps a line's content from being a row of any of the files; empty if nothing does."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    iteration = row.get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        return "it has no whole number under 'iteration'"
    for name, value in row.items():
        if isinstance(value, int | float | None) and not isinstance(value, bool):
            if value is not None and not math.isfinite(value):
                return f"'{name}' is not finite"
        elif name == "figures" and isinstance(value, dict):
            if not all(isinstance(one, dict) and one.keys() >= {"mean", "valid", "samples"} for one in value.values()):
                return "a figure lacks 'mean', 'valid' or 'samples'"
        elif not isinstance(value, str | dict | list):
            return f"'{name}' is neither a number nor a text"
    return ""
