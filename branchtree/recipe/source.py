"""A recipe as plain data, with the origin of every key: a file and line, or an override."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError, shortened, shown
from branchtree.files.reading import half_character, read_text
from branchtree.recipe.plain_yaml import MOST_LEVELS, KeyPath, NotPlainError, read_plain, write_yaml

__all__ = ["KeyPath", "Origin", "Source", "override", "parse_plugin", "parse_value", "read_yaml", "write_yaml"]

NO_TEXT = "holds bytes that are no text in this terminal's encoding; write it in UTF-8, as under LANG=C.UTF-8"


@dataclass(frozen=True)
class Origin:
    """The origin of a key: a file and line, or an override."""

    location: str
    folder: Path | None = None  # of the file; None for an override

    def __str__(self) -> str:
        return self.location


@dataclass
class Source:
    """The data of a recipe, and the origin of each key path in it."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> Origin | None:
        """Return the origin of a key path, or of the nearest enclosing one."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path)

    def update(self, other: Source) -> None:
        """Merge ``other`` over this one: mappings merge key by key, everything else is replaced."""
        for key, value in other.data.items():
            mine = self.data.get(key)
            if isinstance(mine, dict) and isinstance(value, dict):
                Source(mine).update(Source(value))
            else:
                self.data[key] = value
                self.forget((key,))
        self.origins.update(other.origins)

    def forget(self, path: KeyPath) -> None:
        """Drop the origins of a key path and of all paths below it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def parse_value(text: str, name: str = "override value") -> Any:
    """Read one YAML value, as on the right of ``key=value``. Raises RecipeError that begins with ``name``."""
    if half_character(text):
        raise RecipeError(f"{name} {shortened(text)!r}: {NO_TEXT}")
    try:
        return read_plain(text).data
    except NotPlainError as error:
        raise RecipeError(
            f"{name} {shortened(text)!r} is not YAML: {error} (quotes around a text keep it one: '\"[a] b\"')"
        ) from None


def read_yaml(path: Path) -> Source:
    """Read a recipe file. Raises RecipeError, naming file and line, if it is not a YAML mapping."""
    text = read_text(path, RecipeError)
    try:
        plain = read_plain(text)
    except NotPlainError as error:
        raise RecipeError(f"{path}:{error.line}: not valid YAML: {error}") from None
    if not isinstance(plain.data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys to values")
    return Source(plain.data, {at: Origin(f"{path}:{line}", path.parent) for at, line in plain.lines.items()})


def parse_plugin(kind: str, text: str, example: str) -> tuple[str, dict[str, Any]]:
    """Return name and settings of a plug-in written as ``"hps version=v2.0"``. Raises RecipeError."""
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        reason = "it is empty" if not text.strip() else str(error).lower()
        raise RecipeError(
            f"{kind} '{shortened(text)}' cannot be read: {reason}; write NAME key=value, for example \"{example}\""
        ) from None
    settings: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise RecipeError(
                f"{kind} '{shortened(text)}': '{shortened(word)}' is no setting; write it as key=value, all between "
                "one pair of quotes"
            )
        settings[key] = parse_value(value, f"{kind} '{name}': {shortened(key)}:")
    return name, settings


def override(source: Source, overrides: Mapping[str, Any]) -> None:
    """Set dotted keys (``optim.lr``, ``rewards.0.weight``) in a source. Raises RecipeError."""
    for dotted, value in overrides.items():
        written = f"{shortened(dotted)}={shown(value, str)}"
        if half_character(dotted) or (isinstance(value, str) and half_character(value)):
            raise RecipeError(f"override {written}: {NO_TEXT}")
        words = dotted.split(".")
        if len(words) > MOST_LEVELS:
            raise RecipeError(f"override {written}: a key has at most {MOST_LEVELS} levels, not {len(words)}")
        section: Any = source.data
        origin = Origin(f"override {written}")
        path: KeyPath = ()
        for depth, word in enumerate(words):
            key = _key_of(section, word, dotted, depth)
            path = (*path, key)
            if depth == len(words) - 1:
                section[key] = copy.deepcopy(value)  # later overrides may change it
                source.forget(path)
                source.origins[path] = origin
            elif isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
                source.origins[path] = origin
            section = section[key]


def _key_of(section: Any, word: str, dotted: str, depth: int) -> str | int:
    """Return the key or index that one word of a dotted key means in a mapping or list. Raises RecipeError."""
    inside = shortened(".".join(dotted.split(".")[:depth]))
    if isinstance(section, list):
        if not word.isdecimal() or len(word) > len(str(len(section))) or int(word) >= len(section):
            raise RecipeError(
                f"override {shortened(dotted)}: '{inside}' is a list of {len(section)}; write an index from 0"
            )
        return int(word)
    if not isinstance(section, dict):
        raise RecipeError(f"override {shortened(dotted)}: '{inside}' holds a plain value, not keys")
    return word
