"""From a validated recipe to the objects that do the work."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel

from branchtree.core.credit import CreditRule, PruningRule
from branchtree.core.grid import time_grid
from branchtree.core.noise import CorrelatedSiblings, IndependentSiblings, Siblings, SimplexSiblings
from branchtree.core.rollout import Sampler
from branchtree.core.schedule import DrawnSplits, FixedSplits, Schedule, SlidingWindow, SplitAtWindow, Splits, TreePlan
from branchtree.core.sharing import TreeShare, cut
from branchtree.core.transitions import CpsSde, DanceSde, Ddim, FlowSde, Kernel
from branchtree.errors import RecipeError
from branchtree.plugins.protocols import Callback, GroupReward, ModelAdapter, RewardAdapter
from branchtree.plugins.registry import registry
from branchtree.recipe.load import validate_options
from branchtree.recipe.schema import CallbackSection, Recipe, RewardSection, SamplerSection, TreeSection
from branchtree.recipe.source import KeyPath

log = logging.getLogger("branchtree")


@dataclass(frozen=True)
class NamedReward:
    """A reward as a recipe uses it."""

    label: str
    weight: float
    adapter: RewardAdapter
    described: str = ""  # its name and settings

    @property
    def groupwise(self) -> bool:
        """Whether it must see all samples of a prompt at once; known once it is loaded."""
        return isinstance(self.adapter, GroupReward) and self.adapter.groupwise


def make_schedule(recipe: Recipe) -> Schedule:
    """The schedule of the ``tree`` section."""
    tree = recipe.tree
    deepest = tree.steps - 2  # the last step is deterministic
    window = _window(tree, deepest)
    return Schedule(
        steps=tree.steps,
        splits=_splits(tree, recipe.seed, deepest, window),
        sde=window if tree.sde == "window" else tree.sde,
        continuation=tree.continuation,
        fraction=tree.timestep_fraction,
        seed=recipe.seed,
    )


def make_shares(recipe: Recipe, plan: TreePlan) -> list[TreeShare]:
    """The parts of a prompt's tree that the processes of ``batch.processes_per_prompt`` grow, in the order of ranks.

    Raises RecipeError if there are more processes than leaves.
    """
    processes = recipe.batch.processes_per_prompt
    if processes > plan.leaves:
        raise RecipeError(
            f"batch.processes_per_prompt: {processes} processes cannot share the {plan.leaves} leaves of a prompt"
        )
    return cut(plan, processes)


def _window(tree: TreeSection, deepest: int) -> SlidingWindow:
    window = tree.window
    stop = deepest + 1 - window.size if window.stop is None else window.stop
    return SlidingWindow(window.size, window.start, window.every, max(stop, window.start))


def _splits(tree: TreeSection, seed: int, deepest: int, window: SlidingWindow) -> Splits:
    one = tree.branches if isinstance(tree.branches, int) else tree.branches[0]
    if tree.splits == "window":
        return SplitAtWindow(window, one)
    if tree.splits == "single":
        first = min(math.ceil(tree.draw.first * tree.steps), deepest)
        last = min(math.floor(tree.draw.last * tree.steps), deepest)
        return DrawnSplits(first, max(first, last), one, seed)
    steps = tree.split_steps
    branches_each = (tree.branches,) * len(steps) if isinstance(tree.branches, int) else tree.branches
    return FixedSplits(steps, branches_each)


def make_kernel(sampler: SamplerSection, prediction: str) -> Kernel:
    """The transition kernel. Raises RecipeError if it does not suit what the model predicts."""
    if (sampler.kind == "ddim") != (prediction in {"noise", "v"}):
        suits = "ddim" if prediction in {"noise", "v"} else "dance, flow or cps"
        raise RecipeError(
            f"sampler.kind: '{sampler.kind}' does not suit a model that predicts {prediction}; use {suits}"
        )
    if sampler.kind == "ddim":
        return Ddim(sampler.eta, "v" if prediction == "v" else "noise")
    kernels: dict[str, Callable[[float], Kernel]] = {"dance": DanceSde, "flow": FlowSde, "cps": CpsSde}
    return kernels[sampler.kind](sampler.eta)


def make_siblings(tree: TreeSection) -> Siblings:
    """How siblings' noises relate."""
    if tree.siblings == "correlated":
        return CorrelatedSiblings(tree.strength)
    return SimplexSiblings() if tree.siblings == "simplex" else IndependentSiblings()


def make_sampler(recipe: Recipe, model: ModelAdapter) -> Sampler:
    """Kernel, siblings and time grid for a model that is loaded."""
    steps, section = recipe.tree.steps, recipe.sampler
    if recipe.tree.solver == "dpm2m" and model.prediction != "velocity":
        raise RecipeError(f"tree.solver: dpm2m is for flow matching, and this model predicts {model.prediction}")
    sigmas = model.sigmas(steps) if section.grid == "pipeline" else time_grid(steps, section.shift)
    return Sampler(
        kernel=make_kernel(section, model.prediction),
        siblings=make_siblings(recipe.tree),
        sigmas=sigmas.to(torch.float32).cpu(),
        reduction=section.log_prob,
        solver=recipe.tree.solver,
    )


def make_credit_rule(recipe: Recipe) -> CreditRule:
    """The ``credit`` section, and whether the loss has a KL term."""
    credit = recipe.credit
    return CreditRule(
        credit.beta,
        credit.path_scale,
        credit.advantage,
        credit.combine,
        credit.eps,
        credit.clip,
        regularised=recipe.loss.kl > 0,
    )


def planned_steps(recipe: Recipe) -> int:
    """Return the optimiser steps that a whole run plans."""
    return recipe.run.iterations * recipe.optim.steps_per_iteration


def check_learns(recipe: Recipe) -> None:
    """Refuse a recipe that has nothing to learn from, and warn of one whose warm-up outlasts it. Raises RecipeError.

    Beside the checks of the schema, for a run that was made before these were here can still be evaluated.
    """
    if all(reward.weight == 0 for reward in recipe.rewards):
        raise RecipeError("rewards: every weight is 0, so that there is nothing to learn from; give one a weight")
    optim, iterations, total = recipe.optim, recipe.run.iterations, planned_steps(recipe)
    if optim.warmup > total:
        log.warning(
            "optim.warmup: the learning rate rises over %d optimiser steps, more than the %d of the run "
            "(run.iterations %d x optim.steps_per_iteration %d), and never reaches optim.lr; lower it, or train longer",
            optim.warmup,
            total,
            iterations,
            optim.steps_per_iteration,
        )


def make_pruning_rule(recipe: Recipe) -> PruningRule:
    """The ``pruning`` section."""
    return PruningRule(**recipe.pruning.model_dump())


def make_model(recipe: Recipe) -> ModelAdapter:
    """The model adapter, not yet loaded. Raises PluginError or RecipeError."""
    entry = registry().model(recipe.model.adapter)
    adapter: ModelAdapter = entry.build(validate_options(entry.config, recipe.model.options, ("model",)))
    return adapter


def make_reward(name: str, options: Mapping[str, Any], at: KeyPath) -> tuple[RewardAdapter, BaseModel]:
    """A reward adapter, not yet loaded, and its settings. Raises PluginError or RecipeError; ``at`` is its section."""
    entry = registry().reward(name)
    config = validate_options(entry.config, options, at)
    adapter: RewardAdapter = entry.build(config)
    return adapter, config


def make_rewards(
    sections: tuple[RewardSection, ...], at: KeyPath, modality: str, built: Mapping[str, RewardAdapter] | None = None
) -> list[NamedReward]:
    """Reward adapters, not yet loaded. Raises PluginError or RecipeError; ``at`` is the section they stand in.

    ``built`` are adapters of another section by what describes them: one that is described in the same way is used
    again, so that its weights are in memory once.
    """
    free = dict(built or {})
    rewards: list[NamedReward] = []
    for index, section in enumerate(sections):
        adapter, config = make_reward(section.reward, section.options, (*at, index))
        described = f"{section.reward} {config.model_dump_json()}"
        adapter = free.pop(described, adapter)
        place = ".".join(map(str, (*at, index)))
        label = section.label or section.reward
        if modality not in adapter.modalities:
            raise RecipeError(
                f"{place}: reward '{section.reward}' scores {', '.join(sorted(adapter.modalities))}, "
                f"but the model makes {modality}s"
            )
        if label in {reward.label for reward in rewards}:
            raise RecipeError(f"{place}: two rewards are labelled '{label}'; give one a 'label' of its own")
        rewards.append(NamedReward(label, section.weight, adapter, described))
    return rewards


def make_callbacks(sections: tuple[CallbackSection, ...]) -> list[Callback]:
    """The recipe's callbacks."""
    callbacks: list[Callback] = []
    for index, section in enumerate(sections):
        entry = registry().callback(section.callback)
        callbacks.append(entry.build(validate_options(entry.config, section.options, ("callbacks", index))))
    return callbacks
