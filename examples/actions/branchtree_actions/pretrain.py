"""Behaviour cloning of scripted demonstrations: python -m branchtree_actions.pretrain unicycle|pusht."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.samples import TASKS
from branchtree_actions.task import Task

SIZES, BATCH = {"unicycle": (4_000, 4_000), "pusht": (40_000, 10_000)}, 512  # demonstrations and steps


def demonstrations(task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Return what is seen (count, size), and the actions (count, horizon, 2) divided by their scale."""
    rng = np.random.default_rng(0)
    scenes = [task.draw_scene(rng) for _ in range(count)]
    actions = np.stack([task.demonstrate(scene, rng) for scene in scenes])
    seen = torch.from_numpy(np.stack([task.observe(scene) for scene in scenes]))
    return seen.float(), torch.from_numpy(actions / task.action_scale).float()


def clone(policy: Policy, seen: Tensor, actions: Tensor, steps: int) -> None:
    """Train a policy by flow matching."""
    optimiser = torch.optim.AdamW(policy.denoiser.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows, sigma = torch.randint(len(seen), (BATCH,)), torch.rand(BATCH)
        noise = torch.randn(BATCH, *policy.latent_shape)
        noisy = torch.lerp(actions[rows], noise, sigma[:, None, None])
        velocity = policy.predict(noisy, sigma, {"observation": seen[rows]})
        optimiser.zero_grad()
        (velocity - (noise - actions[rows])).square().mean().backward()
        optimiser.step()
        schedule.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Clone a task's scripted demonstrations.")
    parser.add_argument("task", choices=list(TASKS))
    policy = Policy(PolicyConfig(task=parser.parse_args().task))
    torch.manual_seed(0)
    policy.load(torch.device("cpu"), torch.float32, torch.float32)
    clone(policy, *demonstrations(policy.task, SIZES[policy.task.name][0]), SIZES[policy.task.name][1])
    policy.export(Path(__file__).parent / "weights" / policy.task.name)
