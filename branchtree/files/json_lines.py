"""Strict reading of JSON and .jsonl files: whatever is accepted can be written again unchanged."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from branchtree.errors import BranchTreeError, DataError, shortened, shown
from branchtree.files.reading import half_character, read_text

MOST_DIGITS = 300
"""The most digits of a whole number; a longer one fits no float, and Python refuses to print very long ones."""
MOST_LEVELS = 64
"""The most levels of nested lists and objects, so that recursive code can process them."""


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """Return the lines of a text file that are not blank, each with its location. Raises DataError."""
    # Only a line feed ends a line: str.splitlines would also cut at separators that a prompt may contain. A file that
    # was concatenated from several has byte order marks inside.
    lines = (line.removeprefix("\ufeff") for line in read_text(path, DataError).split("\n"))
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_object(line: str, location: str) -> Mapping[str, Any]:
    """Return the object in a line of a .jsonl file. Raises DataError that names the ``location``."""
    row = parse_json(line, location)
    if not isinstance(row, dict):
        raise DataError(f"{location}: each line is one JSON object")
    return row


def read_json_object(path: Path, kind: type[BranchTreeError], infinite: bool = False) -> dict[str, Any]:
    """Return the object in a .json file, and Infinity if ``infinite``. Raises an error of ``kind`` that names it."""
    content = parse_json(read_text(path, kind), str(path), kind, infinite=infinite)
    if not isinstance(content, dict):
        raise kind(f"{path}: does not hold a JSON object")
    return content


def parse_json(
    text: str,
    location: str,
    kind: type[BranchTreeError] = DataError,
    half_characters: bool = False,
    infinite: bool = False,
) -> Any:
    """Return the value of a JSON text that every program reads in the same way and that can be written again.

    Raises an error of ``kind`` that begins with the ``location`` for a text that is not JSON or that programs read
    differently: with a key given twice, NaN, numbers too large, values nested too deeply, or half characters unless
    ``half_characters`` allows them, or Infinity unless ``infinite`` does, as it does for files of Python's libraries.
    """
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_infinite if infinite else _no_number,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        raise kind(f"{location}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # raised for a number or a key
        raise kind(f"{location}: not valid JSON: {error}") from None
    except RecursionError:
        value, deep = None, True
    else:
        deep = text.count("[") + text.count("{") > MOST_LEVELS and _is_deep(value)
    if deep:
        raise kind(f"{location}: is nested deeper than {MOST_LEVELS} levels")
    # Text that was read as UTF-8 can contain half a character only as an escape.
    if (
        not half_characters
        and "\\ud" in text.lower()
        and (half := half_character(json.dumps(value, ensure_ascii=False)))
    ):
        raise kind(f"{location}: {half} is half a character; write both halves, or leave it out")
    return value


def require_writable(value: Any, location: str) -> None:
    """Raise DataError, beginning with the ``location`` inside the value, for a value that JSON cannot express.

    A value that passes is read back equal, with tuples as lists.
    """
    if _is_deep(value):
        raise DataError(f"{location}: is nested deeper than {MOST_LEVELS} levels, or holds itself")
    _require_writable(value, location)


def _require_writable(value: Any, location: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise DataError(f"{location}: the key {shown(key)} is no text; write it as one")
            if _unwritable(key):
                raise DataError(f"{location}: the key {shown(key)} {_unwritable(key)}")
            _require_writable(inner, f"{location}: {shown(key, str)}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_writable(inner, f"{location}[{index}]")
    elif problem := _unwritable(value):
        raise DataError(f"{location}: {problem}")


def _unwritable(value: Any) -> str | None:
    """Say why JSON has no such value, which is neither an object nor a list; None where it does."""
    if isinstance(value, str):
        half = half_character(value)
        return f"holds {half}, which is half a character; leave it out" if half else None
    if isinstance(value, bool | None):
        return None
    if isinstance(value, int):
        return f"a number of more than {MOST_DIGITS} digits is too long" if abs(value) >= 10**MOST_DIGITS else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is no number in JSON; write None, or leave it out"
    return f"is a value of type {type(value).__name__}, which JSON does not have; write a text, a number or a list"


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested in more than MOST_LEVELS levels."""
    nested = [value]
    for _ in range(MOST_LEVELS):
        # Each object once: a list that contains itself twice would double at every level.
        distinct = {id(each): each for each in nested if isinstance(each, dict | list | tuple)}
        nested = [inner for each in distinct.values() for inner in _inside(each)]
    return bool(nested)


def _inside(value: dict[str, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with some keys and values. Raises ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is given twice in one object; remove one")
    return found


def _integer(text: str) -> int:
    digits = len(text.removeprefix("-"))
    if digits > MOST_DIGITS:
        raise ValueError(f"a number of {digits} digits is too long; write at most {MOST_DIGITS}")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(text, 40)} is too large a number")
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON; write null, or leave it out")


def _infinite(text: str) -> float:
    return _no_number(text) if text == "NaN" else float(text)
