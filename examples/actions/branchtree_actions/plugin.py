"""What the entry point in pyproject.toml names; branchtree calls its hooks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from branchtree.plugins import Register, hookimpl
from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.rewards import OutcomeConfig, OutcomeReward
from branchtree_actions.samples import TASKS, Trajectories


@hookimpl
def register_models(register: Register) -> None:
    """Register the model ``actions``."""
    register("actions", build=Policy, config=PolicyConfig, summary="A policy that makes chunks of actions.")


@hookimpl
def register_samples(register: Register) -> None:
    """Register the chunks of actions of each task."""
    for task in TASKS:
        register(f"{task}_actions", build=Trajectories, summary=f"Chunks of actions for {task}.")


@hookimpl
def register_rewards(register: Register) -> None:
    """Register the rewards ``reach`` and ``pusht``."""
    summaries = {"unicycle": "How near its goal a unicycle stops.", "pusht": "How much of its mark a pushed T covers."}
    for name, task in (("reach", "unicycle"), ("pusht", "pusht")):
        register(name, build=partial(OutcomeReward, task), config=OutcomeConfig, summary=summaries[task])


@hookimpl
def register_recipes(register: Callable[[Path], None]) -> None:
    """Register the folder that holds ``unicycle.yaml`` and ``pusht.yaml``."""
    register(Path(__file__).parent / "recipes")
