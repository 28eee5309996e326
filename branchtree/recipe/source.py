"""YAML as plain data, with the file and line that every key came from."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from branchtree.errors import RecipeError

KeyPath = tuple[str | int, ...]
SHOWN = 100
"""Letters of an override's value in a message."""


@dataclass(frozen=True)
class Origin:
    """Where a key was written: a file and line, or an override."""

    place: str
    folder: Path | None = None  # of the file; an override has none

    def __str__(self) -> str:
        return self.place


@dataclass
class Source:
    """A mapping and the origin of each key path in it."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> Origin | None:
        """The origin of a key path, or of the nearest enclosing one."""
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
        """Drop the origins of a key path and of all below it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.2)."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which ``_Loader`` would read as a number."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.inf|\.nan)$"),
        list("-+0123456789."),
    )


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote a text with line breaks of Unicode, which YAML would fold, so that they are written as escapes."""
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def write_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that ``read_yaml`` reads back the same."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_value(text: str) -> Any:
    """One YAML value, as on the right of ``key=value``."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"override value {text!r} is not YAML: {error}") from None


def read_yaml(path: Path) -> Source:
    """Read a recipe file. Raises RecipeError, naming file and line, if it is not a YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, _Loader)
        data = yaml.load(text, _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys to values")
    source = Source(data)
    _record(root, (), path, source.origins)
    return source


def _record(node: yaml.Node, at: KeyPath, path: Path, origins: dict[KeyPath, Origin]) -> None:
    """Note the line of every key below a node."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise RecipeError(f"{path}:{line}: key '{name}' is written twice in one mapping")
            seen.add(name)
            origins[(*at, name)] = Origin(f"{path}:{line}", path.parent)
            _record(value, (*at, name), path, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            origins[(*at, index)] = Origin(f"{path}:{value.start_mark.line + 1}", path.parent)
            _record(value, (*at, index), path, origins)


def parse_plugin(kind: str, text: str, example: str) -> tuple[str, dict[str, Any]]:
    """A plug-in as a command line names it, ``"hps version=v2.0"``: its name and its settings. Raises RecipeError."""
    try:
        name, *words = shlex.split(text)
    except ValueError as error:
        reason = "it is empty" if not text.strip() else str(error).lower()
        raise RecipeError(
            f"{kind} '{text}' cannot be read: {reason}; write NAME key=value, for example \"{example}\""
        ) from None
    settings: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise RecipeError(
                f"{kind} '{text}': '{word}' is no setting; write it as key=value, all between one pair of quotes"
            )
        settings[key] = parse_value(value)
    return name, settings


def override(source: Source, overrides: Mapping[str, Any]) -> None:
    """Set dotted keys (``optim.lr``, ``rewards.0.weight``) in place."""
    for dotted, value in overrides.items():
        *parents, last = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
        place: Any = source.data
        origin = Origin(f"override {dotted}={_shown(value)}")
        for depth, part in enumerate(parents):
            if isinstance(place, dict) and place.get(str(part)) is None:
                place[str(part)] = {}
                source.origins[tuple(parents[: depth + 1])] = origin
            place = _enter(place, part, dotted, depth)
        path: KeyPath = (*parents, last)
        if isinstance(place, list):
            _enter(place, last, dotted, len(parents))
            place[int(last)] = copy.deepcopy(value)  # later overrides may reach into it
        elif isinstance(place, dict):
            place[str(last)] = copy.deepcopy(value)
        else:
            raise RecipeError(f"override {dotted}: '{dotted.rsplit('.', 1)[0]}' holds a plain value, not keys")
        source.forget(path)
        source.origins[path] = origin


def _shown(value: Any) -> str:
    """Return a value in one short line that any terminal can print."""
    text = str(value)
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= SHOWN else f"{plain[:SHOWN]}..."


def _enter(place: Any, part: str | int, dotted: str, depth: int) -> Any:
    inside = ".".join(dotted.split(".")[:depth])
    if isinstance(place, list):
        if not isinstance(part, int) or part >= len(place):
            raise RecipeError(f"override {dotted}: '{inside}' is a list of {len(place)}; write an index from 0")
        return place[part]
    if not isinstance(place, dict):
        raise RecipeError(f"override {dotted}: '{inside}' holds a plain value, not keys")
    return place[str(part)]
