"""Features kept on disk, named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from branchtree.files.writing import write_atomically
from branchtree.plugins.values import Condition
from branchtree.studies.diversity.sampling import FeatureSamples, PlannedSet
from branchtree.studies.diversity.spaces import NamedSpace

VERSION = 1
"""Changes when the same description comes to stand for other samples."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of safetensors files, one for each set and feature space."""

    folder: Path

    def read(self, described: Mapping[str, Any], spaces: Sequence[NamedSpace]) -> FeatureSamples | None:
        """Return the set that is so described; None unless its features are there, and whole, in all spaces."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = {named.label: load_file(self._file(described, named)) for named in spaces}
        except (FileNotFoundError, SafetensorError):
            return None
        distance = next(iter(found.values()))["latent_distance"]
        return FeatureSamples({label: content["features"] for label, content in found.items()}, distance)

    def write(self, described: Mapping[str, Any], spaces: Sequence[NamedSpace], samples: FeatureSamples) -> None:
        """Keep a set, each file whole or not at all."""
        from safetensors.torch import save

        for named in spaces:
            features = samples.features[named.label].contiguous()
            content = save({"features": features, "latent_distance": samples.latent_distance})
            write_atomically(self._file(described, named), content)

    def _file(self, described: Mapping[str, Any], named: NamedSpace) -> Path:
        text = json.dumps({**described, "features": named.space.fingerprint()}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def describe(planned: PlannedSet, weights: str) -> dict[str, Any]:
    """Return all that a set's samples depend on, rounding apart. ``weights`` is the denoiser's digest."""
    recipe, kind, layout = planned.recipe, planned.kind, planned.layout
    return {
        "version": VERSION,
        "model": recipe.model.model_dump(mode="json"),
        "lora": None if recipe.lora is None else recipe.lora.model_dump(mode="json"),  # its scale is no weight
        "weights": weights,
        "tree": recipe.tree.model_dump(mode="json"),
        "sampler": recipe.sampler.model_dump(mode="json"),
        "precision": recipe.run.precision,
        "recipe_seed": recipe.seed,
        "kind": [kind.number, kind.branched, kind.shared],
        "conditions": [_described(condition) for condition in layout.conditions],
        "deal": [layout.groups, layout.size, layout.seed, layout.iteration],
    }


def _described(condition: Condition) -> list[str | None]:
    """Return a condition's texts, and digests of its files."""
    digests = [None if file is None else hashlib.sha256(file.read_bytes()).hexdigest() for file in condition.files]
    return [condition.prompt, condition.negative_prompt, *digests]


def weights_digest(module: nn.Module) -> str:
    """Return a digest of all of a module's weights, names and types included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
