"""What the promises need to know of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import Condition, LoraSettings
from branchtree.recipe.build import make_model
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import Source, override
from branchtree.training.inputs import read_inputs

SMALL: Mapping[str, Any] = {
    "name": "conformance",
    "tree.steps": 6,
    "tree.splits": [0, 2],
    "sampler.eta": 0.7,
    "loss.clip_range": 1e-3,
    "optim.lr": 1e-4,
    "batch.prompts": 2,
    "run.iterations": 2,
    "run.checkpoint_every": 1,
    "run.sample_every": 100,
    "run.sample_prompts": 2,
    "run.tree_every": 100,
}
"""A run of about a second with a tiny model."""


@dataclass(frozen=True)
class AdapterCase:
    """One registered model family with a tiny model of it, so small that a prediction takes milliseconds on a CPU.

    ``model`` and ``reward`` are written as in a recipe; both plug-ins must be installed. ``prompts`` is a recipe's
    ``data.prompts``: the prompts themselves or a prompt file, the first two different and the model's answer to them
    too.
    """

    model: Mapping[str, Any]  # the recipe's section ``model``
    reward: Mapping[str, Any]  # an entry of its ``rewards``, which tells the samples of one prompt apart
    prompts: str | Sequence[str]
    refused: Sequence[Condition] = ()  # conditions that ``check`` must refuse
    lora: LoraSettings | None = field(default_factory=lambda: LoraSettings(rank=4, alpha=8.0))  # None: takes none
    path_key: str = "path"  # the model's key that names a folder which ``export`` wrote
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the training runs' recipe, by dotted key
    states: Callable[[int], torch.Tensor] | None = None  # B -> B different states; by default, initial_noise's
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.bfloat16: 5e-2}
    )  # between one row computed in two batches, relative to the largest number

    def build(self, **options: Any) -> ModelAdapter:
        """Return the adapter, not loaded, as its plug-in builds it; ``options`` replace keys of ``model``."""
        return make_model(self._recipe({"model": {**self.model, **options}}))

    def recipe(self, changes: Mapping[str, Any] | None = None, *, lora: bool = False) -> Recipe:
        """Return a small recipe that trains the model; ``changes`` is by dotted key."""
        prediction = self.build().prediction
        kernel, grid = "ddim" if prediction in {"noise", "v"} else "dance", "linear"
        if prediction == "noise":
            grid = "pipeline"  # an even grid begins at pure noise, of which such a model says nothing
        section = asdict(self.lora) if lora and self.lora else None
        return self._recipe(
            {
                **SMALL,
                "sampler.kind": kernel,
                "sampler.grid": grid,
                "lora": section,
                **self.overrides,
                **(changes or {}),
            }
        )

    @property
    def conditions(self) -> list[Condition]:
        """The conditions in ``prompts``, checked as a run would. Raises ValueError unless the first two differ."""
        conditions = read_inputs(self.recipe()).conditions
        if len(conditions) < 2 or conditions[0] == conditions[1]:
            raise ValueError("a case needs at least two prompts, and the first two must differ")
        return conditions

    def _recipe(self, keys: Mapping[str, Any]) -> Recipe:
        sections: dict[str, Any] = {
            "name": "conformance",
            "model": dict(self.model),
            "rewards": [dict(self.reward)],
            "data": {"prompts": self.prompts if isinstance(self.prompts, str) else list(self.prompts)},
        }
        source = Source(data=sections)
        override(source, keys)
        return Recipe.model_validate(source.data)
