"""The errors that a user can meet. Every message says what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

SHOWN_CHARACTERS = 200
"""The most characters of a user's text that a message repeats."""
SHOWN_REASONS = 5
"""The most bad files that one message lists."""


class BranchTreeError(Exception):
    """Base of all errors raised on purpose; the command line prints its message and exits with 2."""


class RecipeError(BranchTreeError):
    """A recipe, or an override of one, is wrong."""


class PluginError(BranchTreeError):
    """A plug-in is unknown, broken, misspelt, or clashes with another."""


class DataError(BranchTreeError):
    """A prompt file or one of its entries is missing or unusable."""


class ModelError(BranchTreeError):
    """A model folder or hub id cannot be loaded."""


class RewardError(BranchTreeError):
    """A reward failed, or gave nothing that can be trained on."""


class CheckpointError(BranchTreeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class OutputError(BranchTreeError):
    """The run directory cannot be written."""


class DivergenceError(BranchTreeError):
    """The weights have grown until the model makes no finite samples."""


class CallbackError(BranchTreeError):
    """A callback failed."""


class TrackerError(BranchTreeError):
    """An experiment tracker failed."""


class DeviceMemoryError(BranchTreeError):
    """Memory ran out, and no smaller batch can help."""


def refuse(reasons: Sequence[str]) -> None:
    """Raise DataError with the first few reasons, one per line, and the number of the others, if there are reasons."""
    if reasons:
        more = [f"and {len(reasons) - SHOWN_REASONS} more"] if len(reasons) > SHOWN_REASONS else []
        raise DataError("\n".join([*reasons[:SHOWN_REASONS], *more]))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint that ends a message about an unknown name: the nearest known name, then all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f"; did you mean '{close[0]}'?" if close else "."
    return f"{guess} Known: {', '.join(names) or 'none'}."


def reason_of(error: Exception) -> str:
    """Return the message of an error, with its class where it was not raised on purpose."""
    return str(error) if isinstance(error, BranchTreeError) else f"{type(error).__name__}: {error}"


def shortened(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """Return a text, or the beginning and the length of a longer one."""
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"


def shown(value: object, write: Callable[[object], str] = repr) -> str:
    """Return a value as a message repeats it, with codes for characters that a terminal does not print.

    A value that Python refuses to write, such as a huge integer, is given by its type.
    """
    try:
        text = write(value)
        return shortened(text if text.isprintable() else ascii(text)[1:-1])
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too large to show"
