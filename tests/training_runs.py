"""Small training runs on a tiny FLUX, for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from branchtree import load_recipe
from branchtree.run.directory import RunDirectory
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import iterate
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.metrics import gather_metrics
from branchtree.training.session import Session

SMALL: dict[str, Any] = {
    "model.height": 16,
    "model.width": 16,
    "model.max_sequence_length": 8,
    "tree.steps": 6,
    "tree.splits": [0, 2],
    "sampler.eta": 0.7,
    "batch.prompts": 2,
    "data.prompts": ["a seven", "a three", "a one", "a five"],
    "data.shuffle": True,
    "evaluation": None,
    "run.iterations": 2,
    "run.checkpoint_every": 1,
    "run.sample_every": 100,
    "run.sample_prompts": 2,
}


def small(model: Path, **overrides: Any) -> dict[str, Any]:
    """Overrides of the quickstart that make a run of a second or two; keys written with __ for a dot."""
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return {**SMALL, "model.path": str(model), **changed}


def shortened(name: str) -> dict[str, Any]:
    """Overrides that make a recipe's small version as short as can be: an iteration of five steps."""
    changes: dict[str, Any] = {"run.iterations": 1, "run.sample_prompts": 1, "batch.prompts": 2, "tree.steps": 5}
    changes |= {"optim.steps_per_iteration": 1, "evaluation.limit": 1, "evaluation.noises": 1}
    splits = len(load_recipe(name, smoke=True).tree.split_steps)
    return changes | ({"tree.splits": list(range(min(splits, 2)))} if splits else {})


def opened(recipe: str, overrides: Mapping[str, Any], folder: Path) -> Session:
    """A run that is ready for its iterations."""
    loaded = load_recipe(recipe, overrides)
    directory = RunDirectory(folder)
    directory.claim(resume=False)
    return open_session(read_inputs(loaded), directory, make_accelerator(loaded))


def iterated(session: Session) -> list[dict[str, float]]:
    """The figures of a run's iterations, without the pictures, checkpoints and exports of a whole run."""
    return [gather_metrics(session, iterate(session, i)) for i in range(session.recipe.run.iterations)]


def arguments(overrides: dict[str, Any]) -> list[str]:
    """The same overrides as words of the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spreads(run: Path) -> list[float]:
    """How far apart the leaves of each prompt lay, by iteration, as spread.jsonl has it for trees of one plan."""
    rows = [json.loads(line)["spread"] for line in (run / "spread.jsonl").read_text().splitlines()]
    return [spread for row in rows for (prompts,) in [row.values()] for spread in prompts]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights in ``final/``, of a full or a LoRA run."""
    full = run / "final" / "transformer" / "diffusion_pytorch_model.safetensors"
    return load_file(full if full.exists() else run / "final" / "pytorch_lora_weights.safetensors")


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of weights of the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)
