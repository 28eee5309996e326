"""Behaviour cloning of the scripted demonstrations; it writes the weights that the recipes start from.

python -m branchtree_actions.pretrain unicycle
python -m branchtree_actions.pretrain pusht
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.samples import TASKS

FOLDER = Path(__file__).parent / "weights"
BATCH = 512


def demonstrations(task_name: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return observations (count, size) and actions (count, horizon, 2) of about unit size."""
    task, rng = TASKS[task_name], np.random.default_rng(seed)
    scenes = [task.draw_scene(rng) for _ in range(count)]
    actions = np.stack([task.demonstrate(scene, rng) for scene in scenes])
    seen = np.stack([task.observe(scene) for scene in scenes])
    scaled = (actions - task.action_offset) / task.action_scale
    return torch.from_numpy(seen).float(), torch.from_numpy(scaled).float()


def clone(policy: Policy, seen: torch.Tensor, actions: torch.Tensor, steps: int) -> float:
    """Train the policy by flow matching, and return its last loss."""
    optimiser = torch.optim.AdamW(policy.denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(seen), (BATCH,))
        noise, sigma = torch.randn(BATCH, *actions.shape[1:]), torch.rand(BATCH)
        noisy = torch.lerp(actions[rows], noise, sigma[:, None, None])
        velocity = policy.predict(noisy, sigma, {"observation": seen[rows]})
        loss = (velocity - (noise - actions[rows])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return float(loss.detach())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``denoiser.safetensors``."""
    parser = argparse.ArgumentParser(description="Clone a task's scripted demonstrations.")
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--demonstrations", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="folder; by default the package's own")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(task=given.task))
    policy.load(torch.device("cpu"), torch.float32, torch.float32)
    loss = clone(policy, *demonstrations(given.task, given.demonstrations, seed=0), given.steps)
    folder = given.output or FOLDER / given.task
    policy.export(folder)
    print(f"loss {loss:.3f}; written to {folder}")


if __name__ == "__main__":
    main()
