"""The GPUs that a plan fits on, and the changes with which it fits on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from branchtree.core.cost import Cost
from branchtree.planning.gpus import GPUS, Gpu
from branchtree.planning.memory import (
    ALONE,
    MemoryEstimate,
    Surroundings,
    decode_rows,
    estimate_memory,
    rollout_rows,
    update_rows,
)
from branchtree.plugins.values import Footprint
from branchtree.recipe.schema import LoraSection, Recipe

LORA_RANK = 64  # suggested where all weights are trained

Changes = Mapping[str, str | int | bool]
"""New values by recipe key."""
Estimate = Callable[[Recipe], MemoryEstimate]
"""The memory of a recipe on a device."""


@dataclass(frozen=True)
class Fit:
    """A GPU, and the cheapest changes that make a plan fit on it: empty if it fits already, None if nothing helps."""

    gpu: Gpu
    changes: Changes | None


def find_fits(
    recipe: Recipe,
    footprint: Footprint,
    cost: Cost,
    gpus: Sequence[Gpu] = GPUS,
    surroundings: Surroundings = ALONE,
) -> tuple[Fit, ...]:
    """Return for each GPU the cheapest changes with which the plan fits; see ``cheapest_changes``."""
    return tuple(Fit(gpu, cheapest_changes(recipe, footprint, cost, gpu.usable, surroundings)) for gpu in gpus)


def cheapest_changes(
    recipe: Recipe, footprint: Footprint, cost: Cost, budget: int, surroundings: Surroundings = ALONE
) -> Changes | None:
    """Return the cheapest changes with which training needs at most ``budget`` bytes of a device; None if none help.

    Sets of changes are ordered by their costliest member. From cheap to costly: the denoiser on the host while prompts
    are encoded, states on the host, smaller batches, gradient checkpointing (a third more work), bfloat16, LoRA, which
    trains fewer weights, and the weights that it freezes in 8 or 4 bits.
    """

    def estimate(changed: Recipe) -> MemoryEstimate:
        return estimate_memory(changed, footprint, cost, surroundings)

    hosts = _optional({"batch.states": "host"}, recipe.batch.states == "device")
    batches, alone = _batches(recipe, footprint, cost), _alone(recipe, surroundings)
    combined = product(_costly(recipe, footprint), (False, True), hosts, alone)
    options = (({**host, **costly, **left}, limited) for costly, limited, host, left in combined)
    return _first(recipe, estimate, budget, options, batches)


def cheapest_evaluation(recipe: Recipe, estimate: Estimate, budget: int) -> Changes | None:
    """Do the same for an evaluation; fewer samples at a time, encoders alone and, under LoRA, bfloat16 can help."""
    reduced = _optional({"run.precision": "bf16"}, recipe.lora is not None and recipe.run.precision != "bf16")
    batches = {"evaluation.rows": recipe.evaluation.rows} if recipe.evaluation else {}
    combined = product(reduced, (False, True), _alone(recipe, ALONE))
    options = (({**fewer, **left}, limited) for fewer, limited, left in combined)
    return _first(recipe, estimate, budget, options, batches)


def open_limits(
    recipe: Recipe, footprint: Footprint, cost: Cost, budget: int, surroundings: Surroundings = ALONE
) -> dict[str, int]:
    """Return the largest batches that fit in ``budget`` bytes by the estimate, for keys that the recipe leaves open.

    A key whose whole batch fits is left out.
    """
    limits = _limits(
        recipe,
        lambda changed: estimate_memory(changed, footprint, cost, surroundings),
        budget,
        _batches(recipe, footprint, cost),
    )
    return {key: int(rows) for key, rows in limits.items() if _given(recipe, key) is None}


def applied(recipe: Recipe, changes: Changes) -> Recipe:
    """Return the recipe with other values for some keys."""
    for key, value in changes.items():
        name, last = key.split(".")
        section = getattr(recipe, name)
        changed = LoraSection(rank=LORA_RANK) if section is None else section.model_copy(update={last: value})
        recipe = recipe.model_copy(update={name: changed})
    return recipe


def in_words(changes: Changes) -> str:
    """Return changes as they are written on a command line."""
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _first(
    recipe: Recipe,
    estimate: Estimate,
    budget: int,
    options: Iterable[tuple[Changes, bool]],
    batches: Mapping[str, int],
) -> Changes | None:
    """Return the first of the changes that fits, with smaller batches where the option says so."""
    for wanted, limited in options:
        changes, changed = wanted, applied(recipe, wanted)
        if limited:
            limits = _limits(changed, estimate, budget, batches)
            host = {key: value for key, value in wanted.items() if key == "batch.states"}
            changes, changed = {**host, **limits, **wanted}, applied(changed, limits)
        if estimate(changed).device <= budget:
            return changes
    return None


def _costly(recipe: Recipe, footprint: Footprint) -> Iterable[Changes]:
    """Return what the recipe has not switched on yet, in all combinations, the costliest last."""
    checkpointing = _optional({"run.gradient_checkpointing": True}, not recipe.run.gradient_checkpointing)
    reduced = _optional({"run.precision": "bf16"}, recipe.run.precision != "bf16")
    weights = _frozen(recipe, footprint)
    return ({**third, **second, **first} for first, second, third in product(weights, reduced, checkpointing))


def _frozen(recipe: Recipe, footprint: Footprint) -> list[Changes]:
    """Return the ways to freeze weights, from training all to keeping frozen ones in fewer bits, as far as they go."""
    lora: Changes = {"lora.rank": LORA_RANK} if recipe.lora is None else {}
    if lora and footprint.lora_parameters_per_rank == 0:
        return [{}]
    quantizes = recipe.model.quantize is None and footprint.quantizable is not None
    fewer = [{**lora, "model.quantize": kind} for kind in ("int8", "int4") if quantizes]
    return [*_optional(lora, bool(lora)), *fewer]


def _alone(recipe: Recipe, surroundings: Surroundings) -> list[Changes]:
    """Return whether encoders may be alone on the device, which sharded weights cannot leave."""
    if surroundings.sharded:
        return [{"run.encode_alone": False} if recipe.run.encode_alone else {}]
    return _optional({"run.encode_alone": True}, not recipe.run.encode_alone)


def _optional(changes: Changes, possible: bool) -> list[Changes]:
    return [{}, changes] if possible else [{}]


def _batches(recipe: Recipe, footprint: Footprint, cost: Cost) -> dict[str, int]:
    """Return the rows of the largest batches, by key."""
    batches = {"batch.update_rows": update_rows(recipe, cost), "batch.rollout_rows": rollout_rows(recipe, cost)}
    if footprint.decoder is not None:
        batches["batch.decode_rows"] = decode_rows(recipe, cost)
    if recipe.evaluation is not None:
        batches["evaluation.rows"] = recipe.evaluation.rows
    return batches


def _given(recipe: Recipe, key: str) -> int | None:
    section, name = key.split(".")
    rows: int | None = getattr(getattr(recipe, section), name)
    return rows


def _limits(recipe: Recipe, estimate: Estimate, budget: int, batches: Mapping[str, int]) -> Changes:
    """Return the largest batches, by powers of two, that fit beside what is always on the device; at least one row."""
    smallest = applied(recipe, dict.fromkeys(batches, 1))
    limits: dict[str, str | int | bool] = {}
    for key, rows in batches.items():
        fitting = (one for one in _sizes(rows) if estimate(applied(smallest, {key: one})).device <= budget)
        chosen = next(fitting, 1)
        if chosen < rows:
            limits[key] = chosen
        smallest = applied(smallest, {key: chosen})
    return limits


def _sizes(rows: int) -> list[int]:
    """Return ``rows`` and every smaller power of two, from the largest."""
    return [rows, *(2**power for power in reversed(range((rows - 1).bit_length())))]
