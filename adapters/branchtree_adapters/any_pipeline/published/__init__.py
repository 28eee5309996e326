"""Published models: what plans assume of a hub id whose configuration files are not in the local cache.

``models.yaml`` lists them, and ``components.yaml`` what several of them have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from branchtree_adapters.pipeline.blueprint import Published
from branchtree_adapters.pipeline.components import INDEX

FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
"""Names of components' configuration files where they are not config.json."""


@dataclass(frozen=True)
class PublishedModel:
    """A published model, and what is known of it before its files are read."""

    family: str
    name: str
    ids: tuple[str, ...]  # hub ids, all of whose sizes are the same
    task: str
    licence: str
    pipeline: str  # the class in diffusers
    work: str  # rows x calls for one prediction, under guidance
    source: str  # where the configuration comes from
    small: tuple[str, ...]  # small pipelines of the same family that tests run
    files: Published


def _read(name: str) -> Any:
    return yaml.safe_load((resources.files(__package__) / name).read_text(encoding="utf-8"))


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """Return the table of published models."""
    components = _read("components.yaml")
    return tuple(_model(entry, components) for entry in _read("models.yaml").values())


def published_model(hub_id: str) -> PublishedModel | None:
    """Return the published model of a hub id; None for one that is not in the table."""
    return next((model for model in published_models() if hub_id in model.ids), None)


def _model(entry: Mapping[str, Any], components: Mapping[str, Any]) -> PublishedModel:
    index: dict[str, Any] = {"_class_name": entry["pipeline"], **entry.get("settings", {})}
    configs: dict[str, Any] = {}
    for name, given in entry.get("components", {}).items():
        config = _component(given, components)
        kind = config.pop("class", None)
        if kind is not None:
            index[name] = kind.split(".")
        configs[f"{name}/{FILES.get(name, 'config.json')}"] = config
    ids = tuple(entry["ids"])
    return PublishedModel(
        family=entry["family"],
        name=entry["name"],
        ids=ids,
        task=entry["task"],
        licence=entry["licence"],
        pipeline=entry["pipeline"],
        work=entry["work"],
        source=entry["source"],
        small=tuple(entry["small"]),
        files=Published(entry["name"], {**configs, INDEX: index}, ids, entry["source"]),
    )


def _component(given: Any, components: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's configuration: that of the one it names or is like, with changes."""
    if isinstance(given, str):
        return _component(components[given], components)
    base = _component(given["like"], components) if "like" in given else {}
    return {**base, **{name: value for name, value in given.items() if name != "like"}}
