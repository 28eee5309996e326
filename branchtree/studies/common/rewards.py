"""Rewards as a command line or a call names them: ``"hps"``, ``"hps version=v2.0"``, or an entry of a recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from branchtree.errors import RecipeError
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import make_reward
from branchtree.recipe.schema import RewardSection
from branchtree.recipe.source import parse_plugin

Spec = str | Mapping[str, Any]


def make_named(specs: Spec | Sequence[Spec], modality: str | None = None) -> list[NamedReward]:
    """Return the rewards, not loaded, each labelled by its name, or by its whole text where a name comes twice.

    Raises RecipeError for what cannot be read, is set wrongly, is asked for twice or does not score what a model of
    ``modality`` makes, PluginError for an unknown name.
    """
    listed: Sequence[Spec] = [specs] if isinstance(specs, str | Mapping) else specs
    if not listed:
        raise RecipeError("there is no reward to score by; name at least one, as in --reward digits")
    sections = [_section(spec) for spec in listed]
    names = Counter(section.reward for section in sections)
    rewards: list[NamedReward] = []
    for spec, section in zip(listed, sections, strict=True):
        adapter, _ = make_reward(section.reward, section.options, (section.reward,))
        text = " ".join([section.reward, *(f"{key}={value}" for key, value in section.options.items())])
        label = section.label or (section.reward if names[section.reward] == 1 else text)
        if label in {reward.label for reward in rewards}:
            raise RecipeError(f"reward '{label}' is given twice; leave one out, or give it a label=NAME of its own")
        if modality is not None and modality not in adapter.modalities:
            scored = ", ".join(sorted(adapter.modalities))
            raise RecipeError(f"reward '{label}' scores {scored}, but the model makes {modality}s")
        described = spec if isinstance(spec, str) else json.dumps(spec, default=str)
        rewards.append(NamedReward(label, 1.0, adapter, described))
    return rewards


def _section(spec: Spec) -> RewardSection:
    if isinstance(spec, str):
        name, settings = parse_plugin("reward", spec, "digits classifier=heldout")
        keys = {"reward": name, **settings}
    else:
        keys = dict(spec)
    if "weight" in keys:
        raise RecipeError(f"reward '{keys.get('reward')}': scores are given as they are; leave 'weight' out")
    try:
        return RewardSection.model_validate(keys)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        raise RecipeError(f"reward {spec!r}: {key}: {detail['msg'].lower()}") from None
