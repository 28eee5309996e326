"""Held-out figures of the policy that a run started from, also where the run goes on with other prompts or rewards."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from branchtree.core.rollout import Sampler
from branchtree.run.directory import RunDirectory
from branchtree.training.evaluation import Evaluator, Figure
from branchtree.training.microbatch import RowLimits
from branchtree.training.policy import ConditioningCache
from branchtree.training.scoring import make_workers

if TYPE_CHECKING:
    from branchtree.training.session import Inputs

log = logging.getLogger("branchtree")


def missing_base(
    inputs: Inputs, output: RunDirectory, evaluator: Evaluator | None, accelerator: Any
) -> dict[str, Figure] | None:
    """Evaluate the start policy, before a checkpoint's weights are read, unless the run has its figures already.

    Figures of other prompts or rewards do not count. All processes must call this.
    """
    from accelerate.utils import broadcast_object_list

    if evaluator is None:
        return None
    lacking = [accelerator.is_main_process and not output.evaluated(0, inputs.identity)]
    broadcast_object_list(lacking)
    if not lacking[0]:
        return None
    if accelerator.is_main_process:
        log.warning("the run has no held-out figures of these prompts and rewards: evaluating the start policy")
    return evaluator.figures(accelerator)


def make_evaluator(
    inputs: Inputs,
    cache: ConditioningCache,
    sampler: Sampler,
    limits: RowLimits,
    accelerator: Any,
    joint: bool,
) -> Evaluator | None:
    """The evaluator of the recipe's ``evaluation`` section; None without one."""
    section = inputs.recipe.evaluation
    if section is None:
        return None
    return Evaluator(
        section,
        inputs.held_out_conditions,
        inputs.held_out,
        inputs.model,
        cache,
        sampler,
        accelerator.autocast,
        accelerator.device,
        limits,
        make_workers(inputs.recipe.scoring, accelerator.device).scoring,
        joint,
    )
