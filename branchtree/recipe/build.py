"""Makes the objects of a run from a validated recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel

from branchtree.core.credit import CreditRule
from branchtree.core.draws import DrawRule
from branchtree.core.forward import ForwardLoss
from branchtree.core.gaussian import GaussianKernel
from branchtree.core.grid import time_grid
from branchtree.core.loss import EdgeRules
from branchtree.core.noise import Siblings
from branchtree.core.pruning import Prune
from branchtree.core.rollout import Sampler
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.sharing import TreeShare, cut
from branchtree.core.transitions import Kernel, ScalesNoise
from branchtree.errors import RecipeError
from branchtree.plugins.base import Callback
from branchtree.plugins.builtin import sliding_window
from branchtree.plugins.protocols import ModelAdapter, Quantizes, RewardAdapter
from branchtree.plugins.registry import registry
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.load import validate_options
from branchtree.recipe.schema import (
    LARGEST_ETA,
    CallbackSection,
    Choice,
    LossSection,
    PruningSection,
    Recipe,
    RewardSection,
    SamplerSection,
    TreeSection,
)
from branchtree.recipe.source import KeyPath

log = logging.getLogger("branchtree")


def make_rule(kind: str, name: str, choice: Choice | None, at: KeyPath, *given: Any) -> Any:
    """Build a rule of the method: the one that a section's ``choice`` names, or else ``name``.

    Args:
        kind: The kind of rule, as the registry calls it.
        name: The built-in rule that the section's own keys choose.
        choice: The plug-in rule that the recipe names, if any.
        at: The key path of ``choice``.
        given: What ``build`` of this kind gets beside the rule's configuration.

    Raises:
        PluginError: No rule of that name is registered.
        RecipeError: The rule does not have one of the keys.
    """
    entry = registry().rule(kind, name if choice is None else choice.name)
    return entry.build(validate_options(entry.config, {} if choice is None else choice.options, at), *given)


def make_schedule(recipe: Recipe) -> Schedule:
    """Return the schedule of the ``tree`` section."""
    tree = recipe.tree
    name = tree.splits if isinstance(tree.splits, str) else "list"
    return Schedule(
        steps=tree.steps,
        splits=make_rule("split rule", name, tree.split_rule, ("tree", "split_rule"), tree, recipe.seed),
        sde=sliding_window(tree) if tree.sde == "window" else tree.sde,
        continuation=tree.continuation,
        fraction=tree.timestep_fraction,
        seed=recipe.seed,
        noise=recipe.sampler.levels,
        join=tree.join,
    )


def make_shares(recipe: Recipe, plan: TreePlan) -> list[TreeShare]:
    """Divide a prompt's tree over the processes of ``batch.processes_per_prompt``, in the order of ranks.

    Raises RecipeError if there are more processes than leaves.
    """
    processes = recipe.batch.processes_per_prompt
    if processes > plan.leaves:
        raise RecipeError(
            f"batch.processes_per_prompt: {processes} processes cannot share the {plan.leaves} leaves of a prompt"
        )
    return cut(plan, processes)


def make_kernel(sampler: SamplerSection, prediction: str) -> Kernel:
    """Return the transition kernel. Raises RecipeError if it does not suit what the model predicts."""
    at = ("sampler", "transition")
    if sampler.levels:  # a plan has the noise of each split over the kernel's own
        sampler = sampler.model_copy(update={"eta": sampler.level})
    kernel: Kernel = make_rule("transition", sampler.kind, sampler.transition, at, sampler, prediction)
    return kernel


def make_siblings(tree: TreeSection) -> Siblings:
    """Return the rule for the noises of siblings."""
    siblings: Siblings = make_rule("sibling noise", tree.siblings, tree.sibling_noise, ("tree", "sibling_noise"), tree)
    return siblings


def make_sampler(recipe: Recipe, model: ModelAdapter) -> Sampler:
    """Return kernel, siblings and time grid for a loaded model."""
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
    """Return the rules of the ``credit`` and ``pruning`` sections; a KL term in the loss has a say too."""
    credit, forward = recipe.credit, make_forward_loss(recipe)
    return CreditRule(
        credit.beta,
        credit.path_scale,
        make_rule("advantage estimator", credit.advantage, credit.estimator, ("credit", "estimator"), credit),
        credit.combine,
        credit.eps,
        credit.clip,
        regularised=recipe.loss.kl > 0,
        baseline=credit.baseline,
        returns=credit.returns,
        prune=make_prune(recipe.pruning),
        draws=recipe.loss.draws if forward else 0,
        inner_nodes=recipe.loss.inner_nodes,
        whole_groups=bool(forward and forward.whole_groups),
    )


def planned_steps(recipe: Recipe) -> int:
    """Return the number of optimiser steps of a whole run."""
    return recipe.run.iterations * recipe.optim.steps_per_iteration


def check_learns(recipe: Recipe, kernel: Kernel) -> None:
    """Refuse a recipe that cannot learn what it says, and warn if its warm-up is longer than the run.

    The schema does not check this, so that an older run with such a recipe can still be evaluated. Raises RecipeError.
    """
    if all(reward.weight == 0 for reward in recipe.rewards):
        raise RecipeError("rewards: every weight is 0, so that there is nothing to learn from; give one a weight")
    name = recipe.sampler.transition.name if recipe.sampler.transition else recipe.sampler.kind
    solved = {"solver: dpm2m": recipe.tree.solver != "euler", "continuation": recipe.tree.continuation is not None}
    for key in (key for key, asked in solved.items() if asked and not isinstance(kernel, GaussianKernel)):
        raise RecipeError(
            f"tree.{key} is for steps of an ODE, and those of the transition '{name}' are none, as it is not Gaussian; "
            "leave it out"
        )
    _check_probes(recipe, name, kernel)
    _check_gate(recipe)
    if recipe.loss.is_forward:
        _check_forward(recipe, kernel, name)
    else:
        _check_loss(recipe.loss, kernel, name)
    if changes_noise(recipe) and not isinstance(kernel, ScalesNoise):
        key, instead = (
            ("sampler.eta", "give one number") if recipe.sampler.levels else ("tree.adaptive.drop", "set it to null")
        )
        raise RecipeError(f"{key}: the noise of the transition '{name}' has no scale to change; {instead}")
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


def changes_noise(recipe: Recipe) -> bool:
    """Return whether splits may have other noise than the kernel's own."""
    adaptive = recipe.tree.splits == "adaptive" and recipe.tree.split_rule is None
    return bool(recipe.sampler.levels) or (adaptive and recipe.tree.adaptive.drop is not None)


def most_noise(sampler: SamplerSection) -> float:
    """Return the most noise that a split may have, over the kernel's own."""
    return (1.0 if sampler.kind in {"cps", "ddim"} and sampler.transition is None else LARGEST_ETA) / sampler.level


def _check_probes(recipe: Recipe, transition: str, kernel: Kernel) -> None:
    """Raise RecipeError if the recipe asks for probes that cannot be, or for what needs them without them."""
    credit = recipe.credit
    if credit.baseline != "probe":
        if credit.returns == "step":
            raise RecipeError("credit.returns: step is a difference of probes; set credit.baseline to probe")
        return
    if credit.estimator is not None:
        raise RecipeError(
            f"credit.estimator: '{credit.estimator.name}' has no use for probes; leave it out, or set credit.baseline "
            "to group"
        )
    if not isinstance(kernel, GaussianKernel):
        raise RecipeError(
            f"credit.baseline: a probe goes on without noise, which the transition '{transition}' cannot, as it is not "
            "Gaussian; set it to group"
        )


def _check_gate(recipe: Recipe) -> None:
    """Raise RecipeError if the KL term has a gate but no weight, or the gate nothing to compare with."""
    if recipe.loss.gate is None:
        return
    if recipe.loss.kl == 0:
        raise RecipeError("loss.gate: limits the KL term, which has no weight; set loss.kl, or leave the gate out")
    if all(reward.weight != 0 for reward in recipe.rewards):
        raise RecipeError(
            "loss.gate: compares the trained rewards with others, and every reward has a weight; add one of weight 0, "
            "or leave the gate out"
        )


def _check_loss(loss: LossSection, kernel: Kernel, name: str) -> None:
    """Refuse rules of the loss that do not suit the transition of that name. Raises RecipeError."""
    if loss.weighting == "noise" and loss.weighting_rule is None and not isinstance(kernel, ScalesNoise):
        raise RecipeError(
            f"loss.weighting: the noise of the transition '{name}' has no scale to weigh by; set it to none"
        )
    for key, value, rule, plain in (
        ("ratio", "centred", loss.ratio_rule, "plain"),
        ("weighting", "gradient", loss.weighting_rule, "none"),
    ):
        if getattr(loss, key) == value and rule is None and not isinstance(kernel, GaussianKernel):
            raise RecipeError(
                f"loss.{key}: {value} is for Gaussian transitions, and those of the transition '{name}' are not; set "
                f"it to {plain}"
            )


def _check_forward(recipe: Recipe, kernel: Kernel, transition: str) -> None:
    """Refuse what cannot be trained under a forward objective, and keys that only edges have. Raises RecipeError."""
    loss, prunes_depths = recipe.loss, recipe.pruning.rule is None and recipe.pruning.kind == "depth"
    why = f"under the forward objective '{loss.name}' leaves are trained, not edges"
    alone = make_schedule(recipe).plan(0, 0).leaves == 1
    for wrong, message in (
        (
            not isinstance(kernel, GaussianKernel),
            f"loss.kind: '{loss.name}' noises leaves, but the transition '{transition}' is not Gaussian; leave it out",
        ),
        (loss.objective is not None, f"loss.objective: {why}; leave it out"),
        (loss.ratio_rule is not None, f"loss.ratio_rule: {why}; leave it out"),
        (loss.weighting_rule is not None, f"loss.weighting_rule: {why}; leave it out"),
        (loss.ratio != "plain", f"loss.ratio: {why}; set it to plain"),
        (loss.trust != "clip", f"loss.trust: {why}; set it to clip"),
        (loss.weighting != "none", f"loss.weighting: {why}; set it to none"),
        (recipe.credit.baseline == "probe", f"credit.baseline: {why}; set it to group"),
        (prunes_depths, f"pruning.kind: {why}, and depth pruning leaves out edges alone; set it to none"),
        (
            loss.old_policy == "ema" and recipe.optim.ema is None,
            "loss.old_policy: ema is the average of the weights, and none is kept; set optim.ema",
        ),
        (alone, f"tree.splits: '{loss.name}' compares leaves, and this tree has only one; give it a split"),
    ):
        if wrong:
            raise RecipeError(message)


def make_prune(section: PruningSection) -> Prune | None:
    """Return the rule of the ``pruning`` section; None where nothing is pruned."""
    prune: Prune | None = make_rule("pruning rule", section.kind, section.rule, ("pruning", "rule"), section)
    return prune


def make_edge_rules(recipe: Recipe) -> EdgeRules:
    """Return what makes up the loss of an edge."""
    loss = recipe.loss
    trust = {"clip": "clipped"}.get(loss.trust, loss.trust)
    return EdgeRules(
        ratio=make_rule("ratio", loss.ratio, loss.ratio_rule, ("loss", "ratio_rule"), loss),
        loss=make_rule("loss", trust, loss.objective, ("loss", "objective"), loss),
        weighting=make_rule("weighting", loss.weighting, loss.weighting_rule, ("loss", "weighting_rule"), loss),
        recomputed=loss.old_log_prob == "recomputed",
    )


def make_forward_loss(recipe: Recipe) -> ForwardLoss | None:
    """Return the loss of a noised leaf; None where edges are trained."""
    if not recipe.loss.is_forward:
        return None
    at = ("loss", "forward")
    loss: ForwardLoss = make_rule("forward objective", recipe.loss.kind, recipe.loss.forward, at, recipe.loss)
    return loss


def make_draws(recipe: Recipe) -> DrawRule:
    """Return at which noise levels and noises a forward objective looks at leaves."""
    loss = recipe.loss
    return DrawRule(recipe.seed, loss.draws, loss.share_draws, loss.times, loss.time_shift)


def make_model(recipe: Recipe) -> ModelAdapter:
    """Return the model adapter, not yet loaded. Raises PluginError or RecipeError."""
    entry, kind = registry().model(recipe.model.adapter), recipe.model.quantize
    adapter: ModelAdapter = entry.build(validate_options(entry.config, recipe.model.options, ("model",)))
    if kind is not None and not (isinstance(adapter, Quantizes) and kind in adapter.quantizations):
        raise RecipeError(f"model.quantize: models of the family '{recipe.model.adapter}' take no {kind}; leave it out")
    return adapter


def make_reward(name: str, options: Mapping[str, Any], at: KeyPath) -> tuple[RewardAdapter, BaseModel]:
    """Return a reward adapter, not yet loaded, and its settings; ``at`` is its section in a recipe.

    Raises PluginError or RecipeError.
    """
    entry = registry().reward(name)
    config = validate_options(entry.config, options, at)
    adapter: RewardAdapter = entry.build(config)
    return adapter, config


def require_scoring(adapter: RewardAdapter, name: str, key: str, modality: str) -> None:
    """Raise RecipeError if a reward does not score what the model makes."""
    if modality not in adapter.modalities:
        remote = f", and 'remote' does once a plug-in registers the kind '{modality}' (register_samples)"
        raise RecipeError(
            f"{key}: reward '{name}' scores {', '.join(sorted(adapter.modalities))}, but the model makes {modality}s; "
            f"'branchtree rewards' lists those that score {modality}s{'' if modality in registry().samples else remote}"
        )


def make_rewards(
    sections: tuple[RewardSection, ...], at: KeyPath, modality: str, built: Mapping[str, RewardAdapter] | None = None
) -> list[NamedReward]:
    """Return the reward adapters of a section, not yet loaded.

    Args:
        sections: The entries of the section.
        at: The key path of the section.
        modality: What the model makes, which every reward must score.
        built: Adapters of another section by name and settings. One with the same name and settings is used again, so
            that its weights are in memory only once.

    Raises:
        PluginError: A reward is not installed.
        RecipeError: A setting is wrong, a reward does not score ``modality``, or two have the same label.
    """
    free = dict(built or {})
    rewards: list[NamedReward] = []
    for index, section in enumerate(sections):
        adapter, config = make_reward(section.reward, section.options, (*at, index))
        described = f"{section.reward} {config.model_dump_json()}"
        adapter = free.pop(described, adapter)
        key = ".".join(map(str, (*at, index)))
        label = section.label or section.reward
        require_scoring(adapter, section.reward, key, modality)
        if label in {reward.label for reward in rewards}:
            raise RecipeError(f"{key}: two rewards are labelled '{label}'; give one a 'label' of its own")
        rewards.append(NamedReward(label, section.weight, adapter, described))
    return rewards


def make_callbacks(sections: tuple[CallbackSection, ...]) -> list[Callback]:
    """Return the callbacks of a recipe. Raises PluginError or RecipeError."""
    callbacks: list[Callback] = []
    for index, section in enumerate(sections):
        entry = registry().callback(section.callback)
        callbacks.append(entry.build(validate_options(entry.config, section.options, ("callbacks", index))))
    return callbacks
