"""The library's own rules of the method, registered as any plug-in's are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict

from branchtree.core.advantages import ESTIMATORS
from branchtree.core.gaussian import CpsSde, DanceSde, Ddim, FlowSde
from branchtree.core.loss import CentredRatio, ClippedLoss, DivergenceMask, EdgeLoss, EdgeRatio, plain_ratio
from branchtree.core.noise import CorrelatedSiblings, IndependentSiblings, Siblings, SimplexSiblings
from branchtree.core.pruning import Prune, depth_window, extreme_leaves, parent_top1
from branchtree.core.schedule import PRESET_SPLITS, DrawnSplits, FixedSplits, SlidingWindow, SplitAtWindow, Splits
from branchtree.core.transitions import Kernel
from branchtree.core.weighting import StepWeighting, gradient_weights, noise_weights
from branchtree.errors import RecipeError
from branchtree.plugins.hookspecs import Register, hookimpl


class NoKeys(BaseModel):
    """The built-in rules read the keys of their section, and have none of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@hookimpl
def register_transitions(register: Register) -> None:
    """Register the four kernels."""
    flow: dict[str, tuple[Callable[[float], Kernel], str]] = {
        "dance": (DanceSde, "The flow's SDE at one noise level everywhere (DanceGRPO)."),
        "flow": (FlowSde, "The flow's SDE at a noise level that grows with sigma (Flow-GRPO)."),
        "cps": (CpsSde, "Coefficient-preserving sampling (Flow-CPS)."),
    }
    for name, (kernel, summary) in flow.items():
        register(name, build=partial(_flow_kernel, name, kernel), config=NoKeys, summary=summary)
    register("ddim", build=_ddim, config=NoKeys, summary="The eta-DDIM posterior, for models that predict noise or v.")


def _flow_kernel(name: str, kernel: Callable[[float], Kernel], config: NoKeys, section: Any, prediction: str) -> Kernel:
    if prediction != "velocity":
        raise RecipeError(f"sampler.kind: '{name}' does not suit a model that predicts {prediction}; use ddim")
    return kernel(section.eta)


def _ddim(config: NoKeys, section: Any, prediction: str) -> Kernel:
    if prediction not in {"noise", "v"}:
        raise RecipeError(
            f"sampler.kind: 'ddim' does not suit a model that predicts {prediction}; use dance, flow or cps"
        )
    if prediction == "noise" and section.grid != "pipeline":
        raise RecipeError(
            f"sampler.grid: '{section.grid}' begins at pure noise, of which a model that predicts noise says nothing; "
            "set it to pipeline"
        )
    return Ddim(section.eta, "v" if prediction == "v" else "noise")


@hookimpl
def register_siblings(register: Register) -> None:
    """Register how siblings' noises may relate."""
    kinds: dict[str, tuple[Callable[[Any], Siblings], str]] = {
        "correlated": (lambda tree: CorrelatedSiblings(tree.strength), "Siblings' noises correlate (BranchGRPO)."),
        "independent": (lambda _: IndependentSiblings(), "Siblings' noises are independent."),
        "simplex": (lambda _: SimplexSiblings(), "Siblings' noises sum to 0."),
    }
    for name, (make, summary) in kinds.items():
        register(name, build=partial(_of_section, make), config=NoKeys, summary=summary)


def _of_section(make: Callable[[Any], Any], config: NoKeys, section: Any) -> Any:
    """Build a rule by its section alone."""
    return make(section)


@hookimpl
def register_splits(register: Register) -> None:
    """Register the presets, a list of steps, a drawn step and the step of a sliding window."""
    for name in (*PRESET_SPLITS, "list"):
        summary = "The steps that the recipe lists." if name == "list" else f"Steps {PRESET_SPLITS[name]}."
        register(name, build=_fixed_splits, config=NoKeys, summary=summary)
    register("single", build=_drawn_split, config=NoKeys, summary="One step, drawn for each prompt and iteration.")
    register("window", build=_window_split, config=NoKeys, summary="The first step of the sliding SDE window.")


def _fixed_splits(config: NoKeys, section: Any, seed: int) -> Splits:
    steps = section.split_steps
    branches = (section.branches,) * len(steps) if isinstance(section.branches, int) else section.branches
    return FixedSplits(steps, branches)


def _drawn_split(config: NoKeys, section: Any, seed: int) -> Splits:
    deepest = section.steps - 2  # the last step is deterministic
    first = min(math.ceil(section.draw.first * section.steps), deepest)
    last = min(math.floor(section.draw.last * section.steps), deepest)
    return DrawnSplits(first, max(first, last), _one_factor(section), seed)


def _window_split(config: NoKeys, section: Any, seed: int) -> Splits:
    return SplitAtWindow(sliding_window(section), _one_factor(section))


def _one_factor(section: Any) -> int:
    return int(section.branches if isinstance(section.branches, int) else section.branches[0])


def sliding_window(section: Any) -> SlidingWindow:
    """Return the window of SDE steps of a ``tree`` section."""
    window, deepest = section.window, section.steps - 2
    stop = deepest + 1 - window.size if window.stop is None else window.stop
    return SlidingWindow(window.size, window.start, window.every, max(stop, window.start))


@hookimpl
def register_estimators(register: Register) -> None:
    """Register the three estimators of advantages."""
    summaries = {
        "depth": "Each node against its depth (BranchGRPO).",
        "leaf": "Each node against the leaves that are not below it.",
        "sibling": "Each node against its siblings.",
    }
    for name, summary in summaries.items():
        rule = ESTIMATORS[name]
        register(name, build=lambda *_, rule=rule: rule, config=NoKeys, summary=summary)


@hookimpl
def register_pruning(register: Register) -> None:
    """Register no pruning, and the paper's three rules."""

    def top1(_: Any) -> Prune:
        return lambda topology, values, iteration: parent_top1(topology, values)

    def extreme(rule: Any) -> Prune:
        return lambda topology, values, iteration: extreme_leaves(
            topology, values.value[-1], values.valid[-1], rule.count
        )

    def depth(rule: Any) -> Prune:
        return lambda topology, values, iteration: depth_window(topology, rule.size, rule.every, rule.stop, iteration)

    kinds: dict[str, tuple[Callable[[Any], Prune | None], str]] = {
        "none": (lambda _: None, "All edges that the schedule trains."),
        "parent_top1": (top1, "After the last split, the best child of each parent."),
        "extreme": (extreme, "After the last split, the best and the worst leaves."),
        "depth": (depth, "All steps but a window that slides deeper."),
    }
    for name, (make, summary) in kinds.items():
        register(name, build=partial(_of_section, make), config=NoKeys, summary=summary)


@hookimpl
def register_ratios(register: Register) -> None:
    """Register the ratio of densities, and the centred one."""
    kinds: dict[str, tuple[EdgeRatio, str]] = {
        "plain": (plain_ratio, "The ratio of densities."),
        "centred": (CentredRatio(), "The ratio without its bias, scaled by the step's noise (GRPO-Guard)."),
    }
    for name, (rule, summary) in kinds.items():
        register(name, build=lambda *_, rule=rule: rule, config=NoKeys, summary=summary)


@hookimpl
def register_losses(register: Register) -> None:
    """Register the clipped policy gradient, and the one with a mask by divergence."""
    kinds: dict[str, tuple[Callable[[Any], EdgeLoss], str]] = {
        "clipped": (lambda loss: ClippedLoss(loss.clip_range), "PPO's clipped objective."),
        "divergence": (
            lambda loss: DivergenceMask(loss.max_divergence),
            "No gradient for edges that diverge too far (Flow-DPPO).",
        ),
    }
    for name, (make, summary) in kinds.items():
        register(name, build=partial(_of_section, make), config=NoKeys, summary=summary)


@hookimpl
def register_weightings(register: Register) -> None:
    """Register no weights, and those by noise and by gradient."""
    kinds: dict[str, tuple[StepWeighting | None, str]] = {
        "none": (None, "All steps weigh the same."),
        "noise": (noise_weights, "Each step by its noise (TempFlow-GRPO)."),
        "gradient": (gradient_weights, "Each step against the size of its gradient (Flash-GRPO)."),
    }
    for name, (rule, summary) in kinds.items():
        register(name, build=lambda *_, rule=rule: rule, config=NoKeys, summary=summary)
