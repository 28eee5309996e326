"""Memory that the rewards with published weights take, from configuration files or the published sizes.

The sizes of published networks are listed, so that a plan of them imports no model library; `scripts/build_sizes.py`
writes the list. Other networks are built on torch's meta device, which needs no memory and no weights.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree.plugins import RewardFootprint
from branchtree_rewards.shared.source import bundled_json, file_at_hand

PARAMETERS = "published_parameters.json"


@dataclass(frozen=True)
class Skeleton:
    """How large a reward's network is."""

    numbers: Mapping[str, int]  # of parameters, by the network's outermost modules
    assumed: str = ""  # the published model whose sizes it has, where those of the named one are not known
    number_bytes: int = 4

    def footprint(self, offloads: bool) -> RewardFootprint:
        """Return the memory of the weights."""
        return RewardFootprint(sum(self.numbers.values()) * self.number_bytes, offloads, self.assumed)

    def only(self, *modules: str) -> "Skeleton":
        """Return the size of some of the outermost modules."""
        return replace(self, numbers={name: self.numbers[name] for name in modules})


def count_numbers(network: nn.Module) -> Mapping[str, int]:
    """Return the numbers of a network's parameters by its outermost modules; shared parameters count once."""
    numbers: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        numbers[name.partition(".")[0]] += parameter.numel()
    return numbers


def published_numbers(name: str, build: Callable[[], nn.Module]) -> Mapping[str, int]:
    """Return the numbers of a published network, which ``build`` makes where the table does not list it."""
    table = bundled_json(PARAMETERS)
    return table[name] if name in table else build_numbers(build)


def build_numbers(build: Callable[[], nn.Module]) -> Mapping[str, int]:
    """Count the numbers of the network that ``build`` makes, without memory for its weights."""
    with torch.device("meta"):
        return count_numbers(build())


def skeleton(path: str, revision: str | None, published: str, auto_class: str = "AutoModel") -> Skeleton:
    """Return the size of the network of a config.json.

    Args:
        path: A folder, a file or a hub id, whose config.json is read if it is on this machine.
        revision: Branch, tag or commit of the hub id.
        published: The hub id in `data/published_configs.json` whose sizes are taken where there is no config.json.
        auto_class: The class of transformers that makes the network.
    """
    settings = bundled_json("published_configs.json")[published]
    file = file_at_hand(path, revision, "config.json")
    if file is not None:
        settings = {"model_type": settings["model_type"], **read_json_object(file, RewardError)}

    def build() -> nn.Module:
        import transformers

        config = transformers.AutoConfig.for_model(**settings)
        network: nn.Module = getattr(transformers, auto_class).from_config(config)
        return network

    if file is not None:
        return Skeleton(build_numbers(build))
    return Skeleton(published_numbers(published, build), "" if path == published else published)
