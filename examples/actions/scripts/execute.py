"""Executes PushT policies chunk by chunk in held-out scenes: python scripts/execute.py runs/pusht/final."""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.pusht import Table, environment, push
from branchtree_actions.task import Array

from branchtree.plugins import Condition

SCENES = Path(__file__).parents[1] / "branchtree_actions" / "scenes"
CHUNKS = 18  # of an episode: 288 actions, where gym-pusht's own limit is 300


@torch.no_grad()
def act(policy: Policy, scenes: Sequence[Table], steps: int, noise: torch.Generator) -> Array:
    """Return a chunk of actions for each scene, (B, horizon, 2), by Euler's method on an even grid."""
    seen = policy.encode([Condition("", metadata=scene.model_dump()) for scene in scenes])
    latents = torch.stack([policy.initial_noise(noise) for _ in scenes])
    for sigma, following in pairwise(policy.sigmas(steps)):
        velocity = policy.predict(latents, sigma.expand(len(scenes)), seen)
        latents = latents + (following - sigma) * velocity
    actions: Array = policy.decode(latents).actions.double().numpy()
    return actions


def execute(policy: Policy, scenes: Sequence[Table], steps: int, seed: int) -> dict[str, Array]:
    """Return each episode's coverage after some chunks, the best of all, and whether it succeeded, (B,)."""
    tables, noise = [environment(scene) for scene in scenes], torch.Generator().manual_seed(seed)
    coverage, success = np.zeros((CHUNKS + 1, len(scenes))), np.zeros(len(scenes), dtype=bool)
    for count in range(1, CHUNKS + 1):
        coverage[count] = coverage[count - 1]
        going = [row for row in range(len(scenes)) if not success[row]]
        chunks = act(policy, [observed(tables[row]) for row in going], steps, noise)
        for row, chunk in zip(going, chunks, strict=True):
            _, coverage[count, row], success[row] = push(tables[row], chunk)
    shown = {f"after {chunks}": coverage[chunks] for chunks in (1, 2, 4, CHUNKS)}
    return {**shown, "best": coverage.max(axis=0), "success": success}


def observed(table: Any) -> Table:
    """Return the scene that an environment is in."""
    numbers = table.get_obs().tolist()
    return Table(agent=numbers[:2], block=numbers[2:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what the policies in some folders of weights reach, with 95% intervals."""
    parser = argparse.ArgumentParser(description="Execute PushT policies in closed loop, in the held-out scenes.")
    parser.add_argument("weights", type=Path, nargs="+", help="folders, such as a run's final/")
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of a chunk")
    given = parser.parse_args(arguments)
    lines = (SCENES / "pusht_heldout.jsonl").read_text(encoding="utf-8").splitlines()[: given.scenes]
    scenes = [Table.model_validate({k: v for k, v in json.loads(line).items() if k != "prompt"}) for line in lines]
    for folder in given.weights:
        policy = Policy(PolicyConfig(task="pusht", path=folder))
        policy.load(torch.device("cpu"), torch.float32, torch.float32)
        figures = execute(policy, scenes, given.steps, seed=0).items()
        shown = (f"{name} {each.mean():.3f} +- {1.96 * each.std() / len(each) ** 0.5:.3f}" for name, each in figures)
        print(f"{folder}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
