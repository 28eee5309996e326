"""Memory that the rewards with published weights take, from configuration files or the published sizes.

Networks are built on torch's meta device, which needs no memory and no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree.plugins.protocols import RewardFootprint
from branchtree_rewards.shared.source import file_at_hand

Settings = Mapping[str, Any]

CLIP_B_32: Settings = {"model_type": "clip"}  # transformers' defaults
CLIP_L_14: Settings = {
    "model_type": "clip",
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
QWEN2_VL_2B: Settings = {
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
}
QWEN2_5_VL_7B: Settings = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
"""The published models' configurations, as far as they tell sizes."""


@dataclass(frozen=True)
class Skeleton:
    """A reward's network without weights."""

    network: nn.Module
    assumed: str = ""  # the published model whose sizes it has, where those of the named one are not known
    number_bytes: int = 4

    def footprint(self, offloads: bool) -> RewardFootprint:
        """Return the memory of the weights."""
        numbers = sum(parameter.numel() for parameter in self.network.parameters())
        return RewardFootprint(numbers * self.number_bytes, offloads, self.assumed)


def skeleton(path: str, revision: str | None, published: tuple[str, Settings], auto: str = "AutoModel") -> Skeleton:
    """Return the network of a config.json, without memory for weights.

    Args:
        path: A folder, a file or a hub id, whose config.json is read if it is on this machine.
        revision: Branch, tag or commit of the hub id.
        published: A hub id and its configuration, which stands in for a config.json that is not here.
        auto: The class of transformers that makes the network.
    """
    import transformers

    hub_id, settings = published
    file = file_at_hand(path, revision, "config.json")
    if file is not None:
        settings = {"model_type": settings["model_type"], **read_json_object(file, RewardError)}
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        network = getattr(transformers, auto).from_config(config)
    return Skeleton(network, "" if file or path == hub_id else hub_id)
