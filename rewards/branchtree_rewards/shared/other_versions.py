"""Telling weights that are another version than the settings ask for: where shapes are the same, by their names."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from branchtree.errors import RewardError
from branchtree_rewards.shared.source import WeightsSource

VISION = {(32, 768, 224): "vit_b_32", (16, 768, 224): "vit_b_16", (14, 1024, 224): "vit_l_14"}
LARGER = (14, 1024, 336)


def refuse_file(source: WeightsSource, other: str, wanted: str) -> None:
    """Raise RewardError if the one file that was given has a name that matches ``other``.

    Args:
        source: A file, or a folder or hub repository, in which the right file is looked for by its whole name.
        other: A regular expression of names of other versions, in small letters.
        wanted: What the settings ask for, and what to change.
    """
    if source.only is not None:
        refuse_name(source.only.name, other, wanted)


def refuse_name(path: str, other: str, wanted: str) -> None:
    """Raise RewardError if the last word of a path or hub id matches ``other``; see ``refuse_file``."""
    name = PurePath(path).name
    if found := re.search(other, name.lower()):
        raise RewardError(f"'{path}' says by its name that it is another version ('{found[0]}'): {wanted}")


def clip_size(config: Any) -> str | None:
    """The name of OpenAI's CLIP that has the sizes of a CLIPConfig, such as "vit_b_32"; None if none has."""
    vision = config.vision_config
    sizes = (vision.patch_size, vision.hidden_size, vision.image_size)
    return "vit_l_14_336" if sizes == LARGER else VISION.get(sizes)
