"""Values of keys that a study tries one after the other, as a command line writes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchtree.errors import RecipeError
from branchtree.recipe.source import parse_value


@dataclass(frozen=True)
class Grid:
    """One key, and the values that it takes in turn."""

    key: str
    values: tuple[tuple[str, Any], ...]  # as written, and as read


def parse_grid(text: str) -> Grid:
    """Read ``key=v1,v2``; values are YAML, so that lists may be among them, as in ``tree.splits=[0,3],[0,5]``.

    Raises RecipeError for another form.
    """
    key, separator, values = text.partition("=")
    written = split_values(values)
    if not separator or not key or not all(written):
        raise RecipeError(f"grid '{text}': write it as key=value,value, for example tree.strength=1,2,4,8")
    return Grid(key, tuple((value, parse_value(value)) for value in written))


def combinations(grids: Sequence[Grid]) -> list[dict[str, tuple[str, Any]]]:
    """Return each combination of the grids' values, as written and as read, by key; the last grid varies fastest."""
    keys = [grid.key for grid in grids]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(grid.values for grid in grids))]


def split_values(text: str) -> list[str]:
    """Cut a text at its commas but those inside brackets, braces and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]
