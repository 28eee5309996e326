"""JSON that a user or another program wrote, and files of lines of it: what passes can be written again, unchanged."""

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
"""Digits that a whole number may have; a longer one is no float either, and Python refuses to print the longest."""
MOST_LEVELS = 64
"""How deep lists and objects may lie in each other, so that whatever walks through them later can."""


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """A text file's lines that are not blank, each with file and number. Raises DataError."""
    # Lines end at line feeds alone: str.splitlines would also cut at separators that a prompt may hold. Files that were
    # put together out of several have byte order marks inside.
    lines = (line.removeprefix("\ufeff") for line in read_text(path, DataError).split("\n"))
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_object(line: str, location: str) -> Mapping[str, Any]:
    """The object in a line of a .jsonl file. Raises DataError that names the ``location``."""
    row = parse_json(line, location)
    if not isinstance(row, dict):
        raise DataError(f"{location}: each line is one JSON object")
    return row


def read_json_object(path: Path, kind: type[BranchTreeError]) -> dict[str, Any]:
    """The object in a .json file. Raises an error of ``kind`` that names the file."""
    content = parse_json(read_text(path, kind), str(path), kind)
    if not isinstance(content, dict):
        raise kind(f"{path}: does not hold a JSON object")
    return content


def parse_json(text: str, location: str, kind: type[BranchTreeError] = DataError, half_characters: bool = False) -> Any:
    """The value of a JSON text which every other program reads as the same value, and which can be written again.

    Raises an error of ``kind`` that begins with the ``location`` for whatever is no JSON, or is read differently by
    different programs: keys that stand twice, NaN, numbers too large, values nested too deeply, and half characters
    unless ``half_characters`` allows them.
    """
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_no_number,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        raise kind(f"{location}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # of a number, or of a key
        raise kind(f"{location}: not valid JSON: {error}") from None
    except RecursionError:
        value, deep = None, True
    else:
        deep = text.count("[") + text.count("{") > MOST_LEVELS and _is_deep(value)
    if deep:
        raise kind(f"{location}: is nested deeper than {MOST_LEVELS} levels")
    # Only an escape can bring half a character into text that was read as UTF-8.
    if (
        not half_characters
        and "\\ud" in text.lower()
        and (half := half_character(json.dumps(value, ensure_ascii=False)))
    ):
        raise kind(f"{location}: {half} is half a character; write both halves, or leave it out")
    return value


def require_writable(value: Any, location: str) -> None:
    """Raise DataError, beginning with the ``location`` inside what was given, for what a line of JSON cannot hold.

    What passes is read back equal, tuples as lists.
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
    """What is wrong with a value that is neither an object nor a list; None where JSON has it."""
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
    """Whether lists and objects lie in each other more than MOST_LEVELS deep."""
    level = [value]
    for _ in range(MOST_LEVELS):
        # Each once: a list that holds itself twice would double at every level.
        distinct = {id(each): each for each in level if isinstance(each, dict | list | tuple)}
        level = [inner for each in distinct.values() for inner in _inside(each)]
    return bool(level)


def _inside(value: dict[str, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values. Raises ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object; remove one")
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
