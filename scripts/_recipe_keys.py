"""A recipe's keys as Markdown tables, read from the classes that validate them."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

FILLED_IN: Mapping[str, str] = {"name": "the file's name"}
"""Required keys that are filled in before a recipe is checked."""

WIDTH = 120
"""Columns of a line of prose."""
PLAIN = {int: "integer", float: "number", str: "text", bool: "boolean", Path: "path", type(None): "null"}


def recipe_tables(root: type[BaseModel]) -> str:
    """One table for the top level, then one per section, in the order of the schema."""
    tables = [_table(root, "", root)]
    for key, section in _sections(root, ""):
        tables.append(f"### `{key}`\n\n{_lead(section)}\n\n{_table(section, key, root)}")
    return "\n\n".join(tables)


def recipe_keys(root: type[BaseModel]) -> list[str]:
    """Every dotted key."""
    sections = [("", root), *_sections(root, "")]
    return [_dotted(prefix, name) for prefix, section in sections for name in section.model_fields]


def option_table(config: type[BaseModel]) -> str:
    """A plug-in's own keys, below the docstring that gives their meaning."""
    rows = [f"| `{name}` | {_type(field)} | {_default(field)} |" for name, field in config.model_fields.items()]
    return "\n".join([_prose(config), "", "| key | type | default |", "| --- | --- | --- |", *rows])


def _sections(model: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            found.append((_dotted(prefix, name), section))
            found += _sections(section, _dotted(prefix, name))
    # Entries of `evaluation.rewards` are those of `rewards`, described there.
    return [(key, section) for key, section in found if key != "evaluation.rewards"]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for inner in get_args(annotation) if (section := _section(inner)) is not None), None)


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _lead(section: type[BaseModel]) -> str:
    """A section's docstring, without the key that it opens with."""
    text = _prose(section)
    head, separator, rest = text.partition(": ")
    text = rest if separator and "`" in head else text
    return text[0].upper() + text[1:]


def _prose(section: type[BaseModel]) -> str:
    """A docstring as Markdown with lines of the page's width; its list of attributes, if any, as a list."""
    text, _, attributes = re.sub(r"``(.+?)``", r"`\1`", inspect.getdoc(section) or "").partition("\nAttributes:\n")
    entries = re.sub(r"\n {5,}", " ", attributes)
    items = [_lines(re.sub(r"^ *(\w+):", r"- `\1`:", entry), indent="  ") for entry in entries.splitlines()]
    paragraphs = [_lines(paragraph) for paragraph in text.strip().split("\n\n")]
    return "\n\n".join([*paragraphs, "\n".join(items)]).rstrip()


def _lines(text: str, indent: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(section: type[BaseModel], prefix: str, root: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        key = _dotted(prefix, name)
        if not field.description:
            raise SystemExit(f"the recipe key '{key}' has no meaning: give its field a description")
        meaning = field.description.replace("|", "\\|")
        default = FILLED_IN.get(key) or _default(field)
        lines.append(f"| `{key}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    return ", ".join([_words(field.annotation), *_limits(field.metadata)])


def _limits(metadata: Iterable[Any]) -> list[str]:
    """Each bound in words."""
    marks = [mark for entry in metadata for mark in getattr(entry, "metadata", [entry])]
    return [
        f"{words} {_plain(getattr(mark, attribute))}"
        for mark in marks
        for attribute, words in (("ge", "from"), ("gt", "above"), ("lt", "below"), ("le", "to"))
        if getattr(mark, attribute, None) is not None
    ]


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is None:
        return PLAIN.get(annotation) or ("section" if _section(annotation) is not None else str(annotation))
    if origin is tuple:
        return _words_of_list(inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if origin in (Mapping, dict):
        return f"mapping to {_words(inner[1])}"
    return ", ".join([_words(inner[0]), *_limits(inner[1:])])  # what is annotated


def _words_of_list(inner: Sequence[Any]) -> str:
    kind, *limits = _words(inner[0]).split(", ")
    return ", ".join([f"{'list of' if inner[-1] is Ellipsis else len(inner)} {kind}s", *limits])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined:
        return "required"
    return "see section" if isinstance(value, BaseModel) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if value == 2**63:
        return "2^63"
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1e3:
        return f"{value:g}".replace("e+0", "e").replace("e+", "e")
    return json.dumps(value) if value == "" else str(value)
