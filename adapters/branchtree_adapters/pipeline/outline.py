"""A pipeline's sizes by what is known of components with its configuration, for which no model library is imported.

``component_sizes.json`` has the pipelines, the defaults of the components' classes, the keys that decide on a
component's sizes, and the sizes under some values of these. ``scripts/build_sizes.py`` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from branchtree.plugins.values import QuantizableFootprint
from branchtree_adapters.pipeline.blueprint import Published, read_described, read_index
from branchtree_adapters.pipeline.components import is_present
from branchtree_adapters.pipeline.decoders import DecoderWeights, LevelWeights
from branchtree_adapters.pipeline.sources import Configs, ModelSource

FILE = "component_sizes.json"
WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor", "image_processor")
"""Beginnings of the names of components that have no weights."""


@dataclass(frozen=True)
class ComponentSizes:
    """Numbers that follow from a component's configuration."""

    parameters: int
    largest_block: int = 0  # of a denoiser
    lora_parameters_per_rank: int = 0  # of a denoiser, with ``lora_targets``
    lora_targets: tuple[str, ...] = ()
    quantizable: QuantizableFootprint | None = None  # of a denoiser
    decoder: DecoderWeights | None = None  # of a VAE


@dataclass(frozen=True)
class Outline:
    """A pipeline whose components' sizes are known."""

    configs: Configs  # as in a Blueprint
    origin: str
    assumed: bool
    sizes: Mapping[str, ComponentSizes]  # by component, all with weights


@cache
def known() -> Mapping[str, Any]:
    """Return the content of ``component_sizes.json``."""
    content: Mapping[str, Any] = json.loads((resources.files(__package__) / FILE).read_text(encoding="utf-8"))
    return content


def read_outline(
    pipeline: str, source: ModelSource, others: Sequence[str], published: Published | None
) -> Outline | None:
    """Read the configuration files of a pipeline, by its class's name.

    Args:
        pipeline: The name.
        source: Where the files are; nothing is downloaded.
        others: JSON files to read beside those of components with weights.
        published: What is assumed of a hub id that is not in the local cache.

    Returns:
        The outline; None where a component is of another class, or its sizes are not known.

    Raises:
        ModelError: A file is missing or not JSON.
    """
    if pipeline not in known()["pipelines"] or (source.folder is None and published is None):
        return None
    index = read_index(source, published)
    kinds = _kinds(known()["pipelines"][pipeline], index)
    if kinds is None:
        return None
    described = read_described(source, [*(f"{name}/config.json" for name in kinds), *others], published)
    configs, sizes = {**described.configs}, {}
    for name, kind in kinds.items():
        file, facts = f"{name}/config.json", known()["classes"][kind]
        filled = {**facts["defaults"], **configs[file]}
        found = find_sizes(kind, filled)
        if found is None:
            return None
        sizes[name] = found
        configs[file] = filled if facts["library"] == "diffusers" else configs[file]
    return Outline({**configs, "model_index.json": index}, described.origin, described.assumed, sizes)


def _kinds(components: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the classes of the components with weights; None where a model_index.json names others."""
    kinds = {name: facts["class"] for name, facts in components.items() if not facts.get("optional")}
    for name, entry in index.items():
        if name in components:
            kind = components[name]["class"]
            named = is_present(entry) and list(entry) == [known()["classes"][kind]["library"], kind]
            if not named and (is_present(entry) or name in kinds):
                return None
            if named:
                kinds[name] = kind
        elif is_present(entry) and not name.startswith(WITHOUT_WEIGHTS):
            return None
    return kinds


def find_sizes(kind: str, config: Mapping[str, Any]) -> ComponentSizes | None:
    """Return the sizes of a component by its class's name and configuration; None if they are not known."""
    facts = known()["classes"][kind]
    for entry in facts["sizes"]:
        if all(config.get(key) == entry["config"][key] for key in facts["deciding"]):
            return _sizes(entry["sizes"])
    return None


def _sizes(entry: Mapping[str, Any]) -> ComponentSizes:
    decoder = entry["decoder"]
    if decoder is not None:
        levels = tuple(LevelWeights(**level) for level in decoder["levels"])
        decoder = DecoderWeights(**{**decoder, "levels": levels})
    layers = entry["quantizable"] and QuantizableFootprint(**entry["quantizable"])
    targets = tuple(entry["lora_targets"])
    return ComponentSizes(**{**entry, "lora_targets": targets, "quantizable": layers, "decoder": decoder})
