"""The tree, the rows and the memory of a recipe, computed without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from branchtree.core.adaptive import AdaptiveSplits, plan_ahead
from branchtree.core.cost import Cost, count
from branchtree.core.injection import LeafNoise
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.tree import Topology, grow, grow_shares
from branchtree.data.prompts import (
    HUB,
    PromptOrder,
    check_conditions,
    check_for_rewards,
    held_out_conditions,
    training_conditions,
)
from branchtree.errors import PluginError, RecipeError
from branchtree.planning.fitting import Fit, find_fits
from branchtree.planning.gpus import GPUS
from branchtree.planning.memory import MemoryEstimate, estimate_memory
from branchtree.planning.noise import PlannedNoise, planned_noise
from branchtree.planning.preflight import RewardSizes, reward_sizes
from branchtree.plugins.protocols import ModelAdapter, RewardAdapter
from branchtree.plugins.values import Footprint
from branchtree.recipe.build import (
    check_learns,
    make_credit_rule,
    make_edge_rules,
    make_forward_loss,
    make_kernel,
    make_model,
    make_reward,
    make_schedule,
    make_shares,
    require_scoring,
)
from branchtree.recipe.plain_yaml import KeyPath
from branchtree.recipe.schema import DataSection, EvaluationSection, Recipe, RewardSection

FORESEEN = 20
"""Iterations over which a plan averages."""


@dataclass(frozen=True)
class ShareCost:
    """The work of one of the processes that share a prompt's tree, in its rollout."""

    leaves: int
    rollout_rows: int  # predictions, including those that other processes compute too


@dataclass(frozen=True)
class RowBudget:
    """The predictions of an iteration's rollouts, where splits adapt."""

    most: int
    mean: float  # over the first iterations, before anything is learnt
    most_children: int  # of a split


@dataclass(frozen=True)
class RunPlan:
    """What a recipe's first iteration does and needs."""

    recipe: Recipe
    tree: TreePlan  # of the first prompt
    per_prompt: Cost  # of the first prompt
    shares: tuple[ShareCost, ...]  # of the first prompt's tree, one for each process that shares it
    iteration: Cost  # of all prompts
    rows_per_prediction: int
    footprint: Footprint
    memory: MemoryEstimate
    rewards: RewardSizes
    fits: tuple[Fit, ...]  # well-known GPUs, from the smallest
    model: ModelAdapter = field(repr=False)  # not loaded
    budget: RowBudget | None = None  # of an iteration, where splits adapt
    base: Recipe | None = field(default=None, repr=False)  # the recipe without its methods, where it has some

    @cached_property
    def _planned_noise(self) -> PlannedNoise | None:
        # Only where it is asked for: a driven pipeline runs to tell its grid, which takes minutes for the largest.
        return planned_noise(self.recipe, self.model)

    @property
    def noise(self) -> LeafNoise | None:
        """The noise of a leaf, mean over the whole run; None where it is not known."""
        return None if self._planned_noise is None else self._planned_noise.leaf

    @property
    def noise_warning(self) -> str | None:
        """That this noise is much less than without the recipe's methods."""
        before = None if self.base is None else planned_noise(self.base)
        if self.base is None or before is None or self._planned_noise is None:
            return None
        return self._planned_noise.too_little(f"'{self.recipe.name}'", f"'{self.base.name}'", before.leaf.differing)

    @property
    def rollout_rows(self) -> int:
        """Rows through the denoiser in one iteration's rollouts and probes, guidance counted."""
        return (self.iteration.rollout_rows + self.iteration.probe_rows) * self.rows_per_prediction

    @property
    def gradient_rows(self) -> int:
        """Rows through the denoiser in one iteration's gradient pass, guidance counted."""
        return self.iteration.gradient_rows * self.rows_per_prediction

    @property
    def rescored_rows(self) -> float:
        """Rows through the denoiser without a gradient, in one iteration, that a gradient pass compares with.

        They are those of all optimiser steps but the first; of all steps under ``loss.old_policy: ema``. A centred
        forward objective looks at them once more, to know its groups' means.
        """
        loss, later = self.recipe.loss, 1 - 1 / self.recipe.optim.steps_per_iteration
        if not loss.is_forward:
            return later * self.gradient_rows if make_edge_rules(self.recipe).looks_back else 0.0
        rule = make_forward_loss(self.recipe)
        centred = rule is not None and rule.centred
        passes = (1 + 2 * centred) if loss.old_policy == "ema" else later * (1 + centred)
        return passes * self.gradient_rows

    @property
    def rollout_flops(self) -> float:
        """Floating-point operations of an iteration's rollouts in the denoiser."""
        return self.footprint.forward_flops_per_row * self.rollout_rows

    @property
    def gradient_flops(self) -> float:
        """Floating-point operations of an iteration's gradient pass in the denoiser.

        Beside the forward, backward costs two forwards, checkpointing one, and the reference of a KL term one. Weights
        that LoRA freezes need no gradient of their own: then backward costs two forwards for attention and one for the
        other operations; those of the low-rank weights are not counted. To these come the ``rescored_rows``.
        """
        recipe, sizes = self.recipe, self.footprint
        backward = 2.0 if recipe.lora is None else 1 + sizes.attention_flops_per_row / sizes.forward_flops_per_row
        passes = 1 + backward + recipe.run.gradient_checkpointing + (recipe.loss.kl > 0)
        return sizes.forward_flops_per_row * (passes * self.gradient_rows + self.rescored_rows)

    @property
    def decoder_flops(self) -> float:
        """Floating-point operations of decoding an iteration's leaves and probes; 0 where the model does not know."""
        decoder = self.footprint.decoder
        return decoder.flops_per_row * (self.iteration.leaves + self.iteration.probes) if decoder else 0.0

    @property
    def flops(self) -> float:
        """Floating-point operations of one iteration in the denoiser."""
        return self.rollout_flops + self.gradient_flops


def plan_recipe(recipe: Recipe, base: Recipe | None = None) -> RunPlan:
    """Plan the first iteration.

    Args:
        recipe: What is planned.
        base: The same without the methods that it was put under, whose noise it is held against.

    Raises:
        BranchTreeError: The recipe's model or prompts cannot be found.
    """
    model = make_model(recipe)
    check_learns(recipe, make_kernel(recipe.sampler, model.prediction))  # refuses what training would
    schedule, rule = make_schedule(recipe), make_credit_rule(recipe)
    plans = plan_ahead(schedule, 0, _first_prompts(recipe, model))
    footprint = model.footprint()
    if recipe.lora is not None and footprint.lora_parameters_per_rank == 0:
        raise RecipeError(f"lora: no layer of the model family '{recipe.model.adapter}' takes one; leave it out")
    iteration = count(plans, rule, 0)
    rewards = reward_sizes(recipe)
    around = rewards.around()
    return RunPlan(
        recipe=recipe,
        tree=plans[0],
        per_prompt=count(plans[:1], rule, 0),
        shares=tuple(
            ShareCost(len(share.leaves), grow_shares([share]).rollout_rows) for share in make_shares(recipe, plans[0])
        ),
        iteration=iteration,
        rows_per_prediction=model.rows_per_prediction,
        footprint=footprint,
        memory=estimate_memory(recipe, footprint, iteration, around),
        rewards=rewards,
        fits=find_fits(recipe, footprint, iteration, GPUS, around),
        budget=_budget(recipe, schedule),
        model=model,
        base=base,
    )


def _budget(recipe: Recipe, schedule: Schedule) -> RowBudget | None:
    rule, prompts = schedule.splits, recipe.batch.prompts
    if not isinstance(rule, AdaptiveSplits):
        return None
    rows = [grow(plan_ahead(schedule, i, range(i * prompts, (i + 1) * prompts))).rollout_rows for i in range(FORESEEN)]
    return RowBudget(rule.budget(prompts), sum(rows) / len(rows), rule.most)


def _first_prompts(recipe: Recipe, model: ModelAdapter) -> list[int]:
    """Return the ids of the first iteration's prompts; a hub dataset is not fetched, so its order is not known."""
    conditions = training_conditions(recipe.data) if _is_local(recipe.data) else []
    held_out = held_out_conditions(recipe.evaluation) if _is_local(recipe.evaluation) else []
    check_conditions(model, [*conditions, *held_out])
    check_for_rewards(_installed(recipe.rewards, ("rewards",), model.modality), conditions)
    if recipe.evaluation is not None:
        judges = _installed(recipe.evaluation.rewards, ("evaluation", "rewards"), model.modality)
        check_for_rewards(judges, held_out)
    if not conditions:
        return list(range(recipe.batch.prompts))
    return PromptOrder(len(conditions), recipe.seed, recipe.data.shuffle).batch(0, recipe.batch.prompts)


def _installed(sections: Sequence[RewardSection], at: KeyPath, modality: str) -> list[RewardAdapter]:
    """Return the rewards of a section, not loaded, without those that are not installed.

    Raises RecipeError if one does not score ``modality``.
    """
    found = []
    for index, section in enumerate(sections):
        with suppress(PluginError):
            adapter, _ = make_reward(section.reward, section.options, (*at, index))
            require_scoring(adapter, section.reward, ".".join(map(str, (*at, index))), modality)
            found.append(adapter)
    return found


def _is_local(section: DataSection | EvaluationSection | None) -> bool:
    return section is not None and not (isinstance(section.prompts, str) and section.prompts.startswith(HUB))


def draw_tree(plan: TreePlan, max_leaves: int = 32) -> str:
    """Draw one prompt's tree as text: a row per leaf, a column per step; heavy lines are stochastic steps."""
    topology = grow([plan])
    shown = min(plan.leaves, max_leaves)
    header = "".join(f"{step:<3d}" for step in range(plan.steps))
    lines = [f"    {header}".rstrip()]
    for leaf in range(shown):
        cells = [_cell(topology, step, leaf) for step in range(plan.steps)]
        lines.append("    " + "".join(cells) + "o")
    if shown < plan.leaves:
        lines.append(f"    ... and {plan.leaves - shown} more leaves")
    return "\n".join(lines)


def _cell(topology: Topology, step: int, leaf: int) -> str:
    """Return one step of a leaf's row: its edge if the row shows it, or a connector if siblings follow below."""
    above, below = topology.ancestor[step], topology.ancestor[step + 1]
    starts = leaf == 0 or bool(below[leaf] != below[leaf - 1])
    continues = leaf > 0 and bool(above[leaf] == above[leaf - 1])
    more = bool((below[above == above[leaf]] > below[leaf]).any())
    line = "━" if topology.plans[0].stochastic[step] else "─"
    if not starts:
        return "│  " if more else "   "
    start = ("├" if more else "└") if continues else ("┬" if more else line)
    return start + line * 2
