"""Warnings about keys in rows of prompts that are not read but look like ones that are."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

log = logging.getLogger("branchtree")

LIKENESS = 0.8
"""The least similarity of a misspelt key to the known one: promt has .91 to prompt, stage .6 to image."""
ALIASES = {
    "prompt": ("caption", "captions", "text", "description", "instruction"),
    "negative_prompt": ("negative", "negative_caption"),
    "image": ("img", "picture", "photo"),
    "video": ("clip", "movie"),
}
"""Names in other programs for the keys that are read here; meant only if the row lacks the key itself."""


def warn_of_near_keys(rows: Iterable[tuple[str, Mapping[Any, Any]]], known: Iterable[str], prompt: str) -> None:
    """Log each unknown key that is nearly a known one, once, with its first location and the key that may be meant.

    Args:
        rows: The rows of one file, each with its location for messages.
        known: The keys that are read.
        prompt: The key of the prompt among them.
    """
    names, seen = list(known), set[str]()
    aliases = {alias: prompt if name == "prompt" else name for name, found in ALIASES.items() for alias in found}
    for location, row in rows:
        for key in row:
            if not isinstance(key, str) or key in names or key in seen:
                continue
            meant = _meant(key, names)
            alias = aliases.get(key.casefold())
            if meant is None and alias in names and row.get(alias) is None:
                meant = alias
            if meant is not None:
                seen.add(key)
                log.warning("%s: nothing reads the key %r; did you mean %r?", location, key, meant)


def _meant(key: str, known: list[str]) -> str | None:
    """Return the known key that a key resembles; None if it only adds a word, as in "prompt_id"."""
    plain = "_".join(key.casefold().replace("-", " ").replace("_", " ").split())
    if plain in known:
        return plain
    close = difflib.get_close_matches(plain, known, n=1, cutoff=LIKENESS)
    return close[0] if close and not plain.startswith(f"{close[0]}_") else None
