"""What every check returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from branchtree.errors import BranchTreeError, reason_of

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    remedy: str = ""  # what to do; empty where there is nothing to do, or the text says it


def guarded(name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield checks; an error of theirs is a check that fails, since a sick machine must not end the examination."""
    try:
        yield from checks()
    except Exception as error:  # whatever libraries that are broken or do not fit together raise
        expected = isinstance(error, BranchTreeError)
        remedy = "" if expected else "correct what the checks above name, then install branchtree again"
        yield Check(name, "fail", " ".join(reason_of(error).split()), remedy)
