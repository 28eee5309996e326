"""What a recipe will do, worked out without loading a model: the tree, the rows, the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchtree.assembly import make_credit_rule, make_kernel, make_model, make_pruning_rule, make_schedule
from branchtree.cost import Cost, count
from branchtree.data import HUB, PromptOrder, load_conditions
from branchtree.protocols import Footprint
from branchtree.recipe.schema import Recipe
from branchtree.schedule import TreePlan
from branchtree.tree import Topology, grow

ADAM_BYTES = 12
"""Per trained parameter beside its weight: float32 gradient and AdamW's two moments."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the gradient pass, the fullest moment, and on the host."""

    weights: int  # denoiser
    optimizer: int  # gradients and moments; under LoRA the low-rank weights too
    activations: int  # of one gradient batch
    states: int  # the tree's, wherever they are kept
    states_on_host: bool
    frozen: int  # encoders and decoder, on the device only while they work
    average: int  # moving average of the trained weights, on the host

    @property
    def device(self) -> int:
        """Peak on the device."""
        resident = self.weights + self.optimizer + (0 if self.states_on_host else self.states)
        return resident + max(self.activations, self.frozen)

    @property
    def host(self) -> int:
        """Kept on the host."""
        return self.frozen + self.average + (self.states if self.states_on_host else 0)


@dataclass(frozen=True)
class RunPlan:
    """A recipe's first iteration on paper."""

    recipe: Recipe
    tree: TreePlan  # of the first prompt
    per_prompt: Cost  # of the first prompt
    iteration: Cost  # of all prompts
    rows_per_prediction: int
    footprint: Footprint
    memory: MemoryEstimate

    @property
    def rollout_rows(self) -> int:
        """Rows through the denoiser in one iteration's rollouts, guidance counted."""
        return self.iteration.rollout_rows * self.rows_per_prediction

    @property
    def gradient_rows(self) -> int:
        """Rows through the denoiser in one iteration's gradient pass, guidance counted."""
        return self.iteration.gradient_rows * self.rows_per_prediction

    @property
    def flops(self) -> float:
        """Floating-point operations of one iteration in the denoiser; a backward pass costs two forward passes."""
        passes = 4 if self.recipe.run.gradient_checkpointing else 3
        return self.footprint.forward_flops_per_row * (self.rollout_rows + passes * self.gradient_rows)


def plan_recipe(recipe: Recipe) -> RunPlan:
    """Plan the first iteration. Raises a BranchTreeError if the recipe's model or prompts cannot be found."""
    model = make_model(recipe)
    make_kernel(recipe.sampler, model.prediction)  # refuses what training would
    schedule, rule, pruning = make_schedule(recipe), make_credit_rule(recipe), make_pruning_rule(recipe)
    plans = [schedule.plan(0, prompt_id) for prompt_id in _first_prompts(recipe)]
    footprint = model.footprint()
    iteration = count(plans, rule, pruning, 0)
    return RunPlan(
        recipe=recipe,
        tree=plans[0],
        per_prompt=count(plans[:1], rule, pruning, 0),
        iteration=iteration,
        rows_per_prediction=model.rows_per_prediction,
        footprint=footprint,
        memory=estimate_memory(recipe, footprint, iteration),
    )


def _first_prompts(recipe: Recipe) -> list[int]:
    """Ids of the first iteration's prompts; a hub dataset is not fetched for a plan, so its order stays open."""
    prompts = recipe.data.prompts
    if isinstance(prompts, str) and prompts.startswith(HUB):
        return list(range(recipe.batch.prompts))
    conditions = load_conditions(prompts, recipe.data.column, recipe.data.split)
    return PromptOrder(len(conditions), recipe.seed, recipe.data.shuffle).batch(0, recipe.batch.prompts)


def estimate_memory(recipe: Recipe, footprint: Footprint, cost: Cost) -> MemoryEstimate:
    """The memory of one process that does all of an iteration's prompts."""
    reduced = 2 if recipe.run.precision == "bf16" else 4
    if recipe.lora:
        trained = footprint.lora_parameters_per_rank * recipe.lora.rank
        weights, optimizer = footprint.denoiser_parameters * reduced, trained * (4 + ADAM_BYTES)
    else:
        trained = footprint.denoiser_parameters
        weights, optimizer = trained * 4, trained * ADAM_BYTES
    kept = (
        footprint.checkpointed_numbers_per_row
        if recipe.run.gradient_checkpointing
        else footprint.activation_numbers_per_row
    )
    rows = min(recipe.batch.update_rows or cost.gradient_rows, cost.gradient_rows)
    return MemoryEstimate(
        weights=weights,
        optimizer=optimizer,
        activations=rows * footprint.rows_per_prediction * kept * reduced,
        states=cost.nodes * 4 * torch.Size(footprint.latent_shape).numel(),
        states_on_host=recipe.batch.states == "host",
        frozen=footprint.frozen_parameters * reduced,
        average=trained * 4 if recipe.optim.ema else 0,
    )


def draw_tree(plan: TreePlan, max_leaves: int = 32) -> str:
    """One prompt's tree as text: a row per leaf, a column per step; heavy lines are stochastic, light ones not."""
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
    """One step of one leaf's row: its edge where this row carries it, a connector where siblings follow below."""
    above, below = topology.ancestor[step], topology.ancestor[step + 1]
    starts = leaf == 0 or bool(below[leaf] != below[leaf - 1])
    continues = leaf > 0 and bool(above[leaf] == above[leaf - 1])
    more = bool((below[above == above[leaf]] > below[leaf]).any())
    line = "━" if topology.plans[0].stochastic[step] else "─"
    if not starts:
        return "│  " if more else "   "
    joint = ("├" if more else "└") if continues else ("┬" if more else line)
    return joint + line * 2
