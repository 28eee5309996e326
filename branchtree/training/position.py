"""Where a run stands in its prompts and windows, for people who read a checkpoint's state.

All of it follows from the iteration and the recipe, so nothing is read back from here.
"""

from __future__ import annotations

from typing import Any

from branchtree.core.schedule import Schedule, SlidingWindow
from branchtree.data.prompts import PromptOrder
from branchtree.recipe.schema import Recipe


def position(recipe: Recipe, schedule: Schedule, order: PromptOrder, iteration: int) -> dict[str, Any]:
    """What the iteration of this number takes: prompts by their places in the file, and the windows' steps."""
    ids = order.batch(iteration, recipe.batch.prompts)
    window = schedule.sde.steps(iteration) if isinstance(schedule.sde, SlidingWindow) else None
    return {
        "prompts_drawn": iteration * recipe.batch.prompts,
        "next_prompts": [order.index(prompt_id) for prompt_id in ids],
        "sde_window": None if window is None else list(window),
        "pruning_moves": iteration // recipe.pruning.every if recipe.pruning.kind == "depth" else None,
    }
