"""Files of lines, and JSON objects in them, which hold what other files and requests can hold again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from branchtree.errors import DataError, shortened
from branchtree.reading import half_character, read_text

MOST_DIGITS = 300
"""Of a whole number; a longer one is no float either, and Python refuses to print the longest ones."""
MOST_LEVELS = 64
"""Of lists and objects in each other, so that whatever walks through them later can."""


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """A text file's lines that are not blank, each with file and number. Raises DataError."""
    # Lines end at line feeds alone: str.splitlines would also cut at separators that a prompt may hold. Files that were
    # put together out of several have byte order marks inside.
    lines = (line.removeprefix("\ufeff") for line in read_text(path, DataError).split("\n"))
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_object(line: str, place: str) -> Mapping[str, Any]:
    """The object in a line of a .jsonl file. Raises DataError that names the ``place``."""
    try:
        row = json.loads(line, parse_int=_integer, parse_float=_float, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # of a number
        raise DataError(f"{place}: not valid JSON: {error}") from None
    except RecursionError:
        row, deep = None, True
    else:
        deep = line.count("[") + line.count("{") > MOST_LEVELS and _is_deep(row)
    if deep:
        raise DataError(f"{place}: is nested deeper than {MOST_LEVELS} levels")
    if not isinstance(row, dict):
        raise DataError(f"{place}: each line is one JSON object")
    # Only an escape can bring half a character into text that was read as UTF-8.
    if "\\ud" in line.lower() and (half := half_character(json.dumps(row, ensure_ascii=False))):
        raise DataError(f"{place}: {half} is half a character; write both halves, or leave it out")
    return row


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other more than MOST_LEVELS deep."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inside(each)]
    return bool(level)


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long; write at most {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(text, 40)} is too large a number")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON; write null, or leave it out")
