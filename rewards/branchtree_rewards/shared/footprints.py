"""Memory that the rewards with published weights take, from configuration files or the published sizes.

Networks are built on torch's meta device, which needs no memory and no weights.
"""

from dataclasses import dataclass

import torch
from torch import nn

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree.plugins import RewardFootprint
from branchtree_rewards.shared.source import bundled_json, file_at_hand


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


def skeleton(path: str, revision: str | None, published: str, auto_class: str = "AutoModel") -> Skeleton:
    """Return the network of a config.json, without memory for weights.

    Args:
        path: A folder, a file or a hub id, whose config.json is read if it is on this machine.
        revision: Branch, tag or commit of the hub id.
        published: The hub id in `data/published_configs.json` whose sizes are taken where there is no config.json.
        auto_class: The class of transformers that makes the network.
    """
    import transformers

    settings = bundled_json("published_configs.json")[published]
    file = file_at_hand(path, revision, "config.json")
    if file is not None:
        settings = {"model_type": settings["model_type"], **read_json_object(file, RewardError)}
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        network = getattr(transformers, auto_class).from_config(config)
    return Skeleton(network, "" if file or path == published else published)
