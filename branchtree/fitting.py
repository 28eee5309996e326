"""Which GPUs a plan fits on, and what would have to change for it to fit on the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from branchtree.cost import Cost
from branchtree.gpus import GPUS, Gpu
from branchtree.memory import estimate_memory, rollout_rows, update_rows
from branchtree.protocols import Footprint
from branchtree.recipe.schema import LoraSection, Recipe

LORA_RANK = 64  # what is suggested where everything is trained

Changes = Mapping[str, str | int | bool]
"""Recipe keys and the values to give them."""


@dataclass(frozen=True)
class Fit:
    """A GPU, and the cheapest changes that make a plan fit on it: none if it fits as it is, None if nothing helps."""

    gpu: Gpu
    changes: Changes | None


def find_fits(recipe: Recipe, footprint: Footprint, cost: Cost, gpus: Sequence[Gpu] = GPUS) -> tuple[Fit, ...]:
    """What each GPU takes.

    Changes are weighed by the costliest among them. From cheap to costly: states on the host, smaller batches,
    gradient checkpointing (a third more work), bfloat16, and LoRA, which trains less.
    """
    return tuple(Fit(gpu, _cheapest(recipe, footprint, cost, gpu.usable)) for gpu in gpus)


def open_limits(recipe: Recipe, footprint: Footprint, cost: Cost, budget: int) -> dict[str, int]:
    """The largest batches that a device with ``budget`` bytes takes by the estimate, by key, where they are not all.

    Only of keys that the recipe leaves open.
    """
    limits = _limits(recipe, footprint, cost, budget)
    given = {"batch.update_rows": recipe.batch.update_rows, "batch.rollout_rows": recipe.batch.rollout_rows}
    return {key: int(rows) for key, rows in limits.items() if key in given and given[key] is None}


def _cheapest(recipe: Recipe, footprint: Footprint, cost: Cost, budget: int) -> Changes | None:
    hosts = _optional({"batch.states": "host"}, recipe.batch.states == "device")
    for costly, limited, host in product(_costly(recipe, footprint), (False, True), hosts):
        changes = {**host, **costly}
        changed = _applied(recipe, changes)
        if limited:
            limits = _limits(changed, footprint, cost, budget)
            changes, changed = {**host, **limits, **costly}, _applied(changed, limits)
        if estimate_memory(changed, footprint, cost).device <= budget:
            return changes
    return None


def _costly(recipe: Recipe, footprint: Footprint) -> Iterable[Changes]:
    """What the recipe has not switched on yet, in all combinations, those with the costliest last."""
    checkpointing = _optional({"run.gradient_checkpointing": True}, not recipe.run.gradient_checkpointing)
    reduced = _optional({"run.precision": "bf16"}, recipe.run.precision != "bf16")
    possible = recipe.lora is None and footprint.lora_parameters_per_rank > 0
    lora = _optional({"lora.rank": LORA_RANK}, possible)
    return ({**third, **second, **first} for first, second, third in product(lora, reduced, checkpointing))


def _optional(changes: Changes, possible: bool) -> list[Changes]:
    return [{}, changes] if possible else [{}]


def _limits(recipe: Recipe, footprint: Footprint, cost: Cost, budget: int) -> Changes:
    """The largest batches, by powers of two, that fit beside what is on the device throughout; of one row at least."""
    smallest: dict[str, str | int | bool] = {"batch.update_rows": 1, "batch.rollout_rows": 1}
    used = {"batch.update_rows": update_rows(recipe, cost), "batch.rollout_rows": rollout_rows(recipe, cost)}
    if recipe.evaluation is not None:
        smallest["evaluation.rows"], used["evaluation.rows"] = 1, recipe.evaluation.rows
    row = estimate_memory(_applied(recipe, smallest), footprint, cost)
    room = max(budget - row.resident, 0)
    limits: dict[str, str | int | bool] = {}
    for key, rows in used.items():
        each = row.activations if key == "batch.update_rows" else row.forward
        if rows * each > room:
            limits[key] = 2 ** (max(room // each, 1).bit_length() - 1)
    return limits


def _applied(recipe: Recipe, changes: Changes) -> Recipe:
    for key, value in changes.items():
        name, last = key.split(".")
        section = getattr(recipe, name)
        changed = LoraSection(rank=LORA_RANK) if section is None else section.model_copy(update={last: value})
        recipe = recipe.model_copy(update={name: changed})
    return recipe
