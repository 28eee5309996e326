"""Feature spaces: what samples are turned into before they are compared, and how a command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from branchtree.errors import RecipeError, RewardError
from branchtree.plugins.registry import registry
from branchtree.recipe.load import validate_options
from branchtree.recipe.source import parse_plugin


class FeatureSpace(Protocol):
    """Turns samples into feature vectors. Built from its own configuration; nothing is loaded before ``load``."""

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities it can take; none for a space that takes any."""

    @property
    def backend(self) -> str:
        """Which network and which preprocessing features come from, in words, for results. Known after ``load``."""

    def load(self, device: torch.device) -> None:
        """Load what is needed. Raises RewardError if weights are missing or do not fit."""

    def features(self, media: Any) -> Tensor:
        """Features (B, D) float32 of B samples, each independent of the others."""

    def fingerprint(self) -> str:
        """A digest of weights and settings: equal ones give equal features. Called after ``load``."""


@dataclass(frozen=True)
class NamedSpace:
    """A feature space as a user asked for it."""

    label: str
    space: FeatureSpace


def make_spaces(specs: Sequence[str], modality: str) -> list[NamedSpace]:
    """Return the feature spaces, not loaded, each given as ``"clip path=DIR normalize=true"``.

    Raises RecipeError for what cannot be read, is set wrongly, is asked for twice, or does not take ``modality``;
    PluginError for an unknown name.
    """
    spaces: list[NamedSpace] = []
    for spec in specs:
        name, options = parse_plugin("features", spec, "pixels size=16")
        entry = registry().feature(name)
        space: FeatureSpace = entry.build(validate_options(entry.config, options, ("features", name)))
        if space.modalities and modality not in space.modalities:
            taken = ", ".join(f"{each}s" for each in sorted(space.modalities))
            raise RecipeError(
                f"features '{name}' are of {taken}, but the model makes {modality}s; 'tensors' takes any samples"
            )
        if spec in {named.label for named in spaces}:
            raise RecipeError(f"features '{spec}' are asked for twice; leave one out")
        spaces.append(NamedSpace(spec, space))
    return spaces


def load_spaces(spaces: Sequence[NamedSpace], device: torch.device) -> None:
    """Load all. Raises RewardError, naming the one that fails."""
    for named in spaces:
        try:
            named.space.load(device)
        except Exception as error:  # a plug-in can raise anything; name it
            reason = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
            raise RewardError(f"features '{named.label}' cannot be loaded: {reason}") from error
