"""Finds the paths in a recipe, also in the settings of plug-ins, and makes them absolute."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from branchtree.files.paths import PathKey
from branchtree.recipe.schema import CallbackSection, ModelSection, PluginSection, Recipe, RewardSection
from branchtree.recipe.source import KeyPath, Source

Found = tuple[KeyPath, str, PathKey]
"""The key path of a path, its value, and the mark of its type."""

PLUGINS: dict[type[PluginSection], tuple[str, str]] = {
    ModelSection: ("adapter", "models"),
    RewardSection: ("reward", "rewards"),
    CallbackSection: ("callback", "callbacks"),
}
"""The key that names a section's plug-in, and the registry's attribute for plug-ins of that kind."""


def make_absolute(source: Source) -> None:
    """Replace the paths in a recipe's data by absolute ones.

    A path in a file is relative to that file's folder, and one in an override to the working directory. A value that
    may be a name or a path, and exists in the working directory only, is the path there, as plug-ins read it.
    """
    here = Path.cwd()
    for at, value, key in list(path_values(Recipe, source.data)):
        origin = source.origin(at)
        folders = (here,) if origin is None or origin.folder is None else (origin.folder, here)
        _put(source.data, at, key.absolute(value, folders))


def local_paths(recipe: Mapping[str, Any]) -> dict[str, Path]:
    """Return the paths in a recipe's plain data, by dotted key."""
    found: dict[str, Path] = {}
    for at, value, key in path_values(Recipe, recipe):
        path = Path(key.absolute(value, (Path.cwd(),)))
        if path.is_absolute():
            found[".".join(map(str, at))] = path
    return found


def path_values(model: type[BaseModel], data: Any, at: KeyPath = ()) -> Iterator[Found]:
    """Yield the values in ``data``, which need not be valid, that the types of ``model`` declare to be paths."""
    if not isinstance(data, Mapping):
        return
    for name, field in model.model_fields.items():
        if name in data:
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            yield from _values(annotation, data[name], (*at, name))
    config = _plugin_config(model, data)
    if config is not None:
        yield from path_values(config, {key: value for key, value in data.items() if key not in model.model_fields}, at)


def _plugin_config(model: type[BaseModel], data: Mapping[str, Any]) -> type[BaseModel] | None:
    """Return the class of a plug-in's settings if ``model`` is the section of an installed plug-in, else None."""
    from branchtree.plugins.registry import registry

    key, kind = next((named for section, named in PLUGINS.items() if issubclass(model, section)), ("", ""))
    entry = getattr(registry(), kind).get(str(data.get(key))) if kind else None
    return None if entry is None else entry.config


def _values(annotation: Any, value: Any, at: KeyPath) -> Iterator[Found]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        key = next((mark for mark in inner[1:] if isinstance(mark, PathKey)), None)
        if key is not None and isinstance(value, str | Path):
            yield at, str(value), key
        else:
            yield from _values(inner[0], value, at)
    elif origin in (Union, types.UnionType):
        for member in inner:
            yield from _values(member, value, at)
    elif annotation is Path and isinstance(value, str | Path):
        yield at, str(value), PathKey(always=True)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from path_values(annotation, value, at)
    elif isinstance(value, Mapping) and len(inner) == 2:
        for name, entry in value.items():
            yield from _values(inner[1], entry, (*at, name))
    elif isinstance(value, Sequence) and not isinstance(value, str) and inner:
        for index, entry in enumerate(value):
            yield from _values(inner[0], entry, (*at, index))


def _put(data: Any, at: KeyPath, value: str) -> None:
    *sections, last = at
    for key in sections:
        data = data[key]
    data[last] = value
