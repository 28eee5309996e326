"""The check that a run fits on this device, before anything is downloaded or loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from branchtree.core.adaptive import plan_ahead
from branchtree.core.cost import Cost, count
from branchtree.errors import DeviceMemoryError, PluginError
from branchtree.planning.fitting import Changes, applied, cheapest_changes, cheapest_evaluation, in_words, open_limits
from branchtree.planning.gpus import GIB, DeviceMemory, device_memory
from branchtree.planning.memory import (
    MemoryEstimate,
    Surroundings,
    estimate_evaluation,
    estimate_memory,
    prompts_each,
)
from branchtree.plugins.protocols import ModelAdapter, RewardAdapter, SizedReward
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Footprint, RewardFootprint
from branchtree.recipe.build import make_credit_rule, make_model, make_reward, make_schedule
from branchtree.recipe.schema import Recipe, RewardSection
from branchtree.recipe.source import KeyPath

FSDP2 = "recipes/accelerate/fsdp2.yaml"
PROCESSES = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs over which weights may be sharded, in the order in which they are tried."""
NAMED = 4  # the most needs that a message names
RELIEF = 0.9
"""The fraction of the estimate that must suffice where memory ran out in spite of the estimate."""
NOTHING = "nothing that is known here; take a larger device"


@dataclass(frozen=True)
class RewardSize:
    """A reward of a recipe, and its memory if it knows it."""

    label: str
    footprint: RewardFootprint | None


@dataclass(frozen=True)
class RewardSizes:
    """The rewards that are trained on, and those that only judge."""

    trained: tuple[RewardSize, ...]
    held_out: tuple[RewardSize, ...] = ()

    @property
    def all(self) -> tuple[RewardSize, ...]:
        """All rewards, those that are trained on first."""
        return self.trained + self.held_out

    def around(self, processes: int = 1, sharded: bool = False, gathered_whole: bool = False) -> Surroundings:
        """Return the rewards' memory; the two groups never score at once, so only the larger offloaded one counts."""
        kept = sum(size.footprint.weights for size in self.all if size.footprint and not size.footprint.offloads)
        groups = [
            sum(size.footprint.weights for size in group if size.footprint and size.footprint.offloads)
            for group in (self.trained, self.held_out)
        ]
        return Surroundings(kept, max(groups), processes, sharded, gathered_whole)


def size_of(label: str, adapter: RewardAdapter) -> RewardSize:
    """Return a reward's memory, if its adapter knows it."""
    return RewardSize(label, adapter.footprint() if isinstance(adapter, SizedReward) else None)


def reward_sizes(recipe: Recipe) -> RewardSizes:
    """Return the memory of a recipe's rewards; it is not known for those that are not installed.

    A reward that judges with the same settings as one that is trained on is loaded once, and counted once.
    """
    found: list[list[RewardSize]] = []
    seen: dict[str, int] = {}
    groups: list[tuple[KeyPath, tuple[RewardSection, ...]]] = [(("rewards",), recipe.rewards)]
    if recipe.evaluation is not None:
        groups.append((("evaluation", "rewards"), recipe.evaluation.rewards))
    for at, sections in groups:
        found.append([])
        free = dict(seen)
        for index, section in enumerate(sections):
            label = section.label or section.reward
            try:
                adapter, config = make_reward(section.reward, section.options, (*at, index))
            except PluginError:
                found[-1].append(RewardSize(label, None))
                continue
            described = f"{section.reward} {config.model_dump_json()}"
            if free.get(described):
                free[described] -= 1
                continue
            seen[described] = seen.get(described, 0) + 1
            found[-1].append(size_of(label, adapter))
    return RewardSizes(*(tuple(sizes) for sizes in found))


def require_memory(recipe: Recipe, force: bool) -> None:
    """Refuse a training run that needs more memory than this device has free, unless ``force`` is true.

    Without an accelerator that reports its memory every run may start. Raises DeviceMemoryError that says what the
    memory is needed for and which changes would fit.
    """
    memory = None if force else device_memory()
    if memory is None:
        return
    need = TrainingNeed.of(recipe)
    started = applied(recipe, need.open_limits(memory.usable))
    estimate = need.estimate(started)
    if estimate.device > memory.free:
        raise DeviceMemoryError(_refusal("training", estimate, memory, need.remedy(memory.usable), need.footprint))


def require_evaluation_memory(
    recipe: Recipe, model: ModelAdapter, rewards: Sequence[NamedReward], rows: int, force: bool
) -> None:
    """Do the same for an evaluation that makes ``rows`` samples at a time. Raises DeviceMemoryError."""
    memory = None if force else device_memory()
    if memory is None:
        return
    footprint = model.footprint()
    around = RewardSizes((), tuple(size_of(reward.label, reward.adapter) for reward in rewards)).around()

    def estimate(changed: Recipe) -> MemoryEstimate:
        changed_rows = changed.evaluation.rows if changed.evaluation else rows
        return estimate_evaluation(changed, footprint, changed_rows, around)

    needed = estimate(recipe)
    if needed.device > memory.free:
        changes = cheapest_evaluation(recipe, estimate, memory.usable)
        remedy = in_words(changes) if changes else NOTHING
        raise DeviceMemoryError(_refusal("this evaluation", needed, memory, remedy, footprint))


@dataclass(frozen=True)
class TrainingNeed:
    """The memory that a process of a training run needs on its device, and the changes that would need less."""

    recipe: Recipe
    footprint: Footprint
    rewards: RewardSizes
    costs: Mapping[int, Cost]  # of one process, by the number of processes
    here: Surroundings

    @staticmethod
    def of(recipe: Recipe, model: ModelAdapter | None = None) -> TrainingNeed:
        """Return the need of this process, whose launcher states the number of processes in the environment."""
        rewards, processes = reward_sizes(recipe), int(os.environ.get("WORLD_SIZE", "1"))
        footprint = (model or make_model(recipe)).footprint()
        schedule, rule = make_schedule(recipe), make_credit_rule(recipe)
        costs = {
            number: count(plan_ahead(schedule, 0, range(prompts_each(recipe, number))), rule, 0)
            for number in {processes, *PROCESSES}
        }
        sharded = _asked("ACCELERATE_USE_FSDP", "false")
        whole = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper() == "NO_WRAP"
        gathered = whole or not _asked("FSDP_RESHARD_AFTER_FORWARD", "true")
        here = rewards.around(processes, sharded, sharded and gathered)
        return TrainingNeed(recipe, footprint, rewards, costs, here)

    @property
    def cost(self) -> Cost:
        """The work of one process of this run."""
        return self.costs[self.here.processes]

    def estimate(self, recipe: Recipe | None = None) -> MemoryEstimate:
        """Estimate the memory under the recipe, or under a changed one."""
        return estimate_memory(recipe or self.recipe, self.footprint, self.cost, self.here)

    def open_limits(self, budget: int) -> dict[str, int]:
        """Return the batches to start with, for keys that the recipe leaves open."""
        return open_limits(self.recipe, self.footprint, self.cost, budget, self.here)

    def remedy(self, budget: int) -> str:
        """Return the changes that would fit, in words."""
        changes = cheapest_changes(self.recipe, self.footprint, self.cost, budget, self.here)
        ways = [in_words(changes)] if changes else []
        sharded = self._sharded(budget)
        if sharded is not None:
            processes, more = sharded
            along = f", with {in_words(more)}" if more else ""
            command = f"accelerate launch --config_file {FSDP2} --num_processes {processes} ..."
            ways.append(f"FSDP2 over {processes} such GPUs ({command}){along}")
        return "; or ".join(ways) or NOTHING

    def _sharded(self, budget: int) -> tuple[int, Changes] | None:
        """Return the fewest processes with which FSDP2 can train these weights, and what else must change; or None."""
        for processes, cost in sorted(self.costs.items()):
            if processes <= (self.here.processes if self.here.sharded else 1):
                continue
            around = self.rewards.around(processes, sharded=True)
            changes = cheapest_changes(self.recipe, self.footprint, cost, budget, around)
            if changes is not None and not {"lora.rank", "model.quantize"} & changes.keys():
                enough = processes <= self.recipe.batch.prompts  # each process needs a prompt
                return processes, changes if enough else {"batch.prompts": processes, **changes}
        return None


def step_shortage(recipe: Recipe) -> str:
    """Say what to change if memory ran out in the optimiser's step, when no activations are in memory any more."""
    memory, need = device_memory(), TrainingNeed.of(recipe)
    budget = int(need.estimate().resident * RELIEF)
    return need.remedy(budget if memory is None else min(budget, memory.usable))


def _asked(variable: str, default: str) -> bool:
    return os.environ.get(variable, default).lower() == "true"


def _refusal(work: str, estimate: MemoryEstimate, memory: DeviceMemory, remedy: str, footprint: Footprint) -> str:
    largest = sorted(estimate.needs.items(), key=lambda item: -item[1])[:NAMED]
    named = ", ".join(f"{words} {size / GIB:.3g} GiB" for words, size in largest)
    assumed = f" Model sizes: {footprint.source}." if footprint.assumed else ""
    return (
        f"{work} needs {estimate.device / GIB:.3g} GiB of {memory.name} by the plan's estimate, and "
        f"{memory.free / GIB:.3g} of its {memory.total / GIB:.3g} GiB are free. The largest needs: {named}. "
        f"What would fit: {remedy}.{assumed} --force (force=True) starts it all the same."
    )
