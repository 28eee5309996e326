"""Loading a CLIPModel in transformers' own layout, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from branchtree.errors import RewardError
from branchtree_rewards.shared.source import WeightsSource
from branchtree_rewards.shared.weights import from_pretrained

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_clip(source: WeightsSource) -> tuple[Any, Path]:
    """The CLIPModel of ``source`` in float32 on the CPU, and the file that its weights came from.

    Raises RewardError if there is no such file, or if it does not fit its config.json.
    """
    from transformers import CLIPModel

    if source.only:
        raise RewardError(f"'{source.only}' is one file; give the folder that holds it with its config.json")
    file = source.find(*WEIGHTS)
    network = from_pretrained(
        CLIPModel,
        source.location,
        torch.float32,
        revision=source.revision,
        use_safetensors=file.suffix == ".safetensors",  # so that the file which is pinned is the one that is read
    )
    return network, file
