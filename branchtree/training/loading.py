"""Building a session: the model and the rewards are loaded, and the optimiser prepared, cheapest mistakes first."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from branchtree.core.forward import ForwardLoss, Prediction
from branchtree.data.prompts import PromptOrder
from branchtree.errors import BranchTreeError, ModelError, RecipeError, RewardError, reason_of
from branchtree.planning.devices import indexed
from branchtree.planning.gpus import USABLE, device_memory
from branchtree.planning.preflight import TrainingNeed, step_shortage
from branchtree.plugins.protocols import CompilesBlocks, FreezesUnused, ModelAdapter, Quantizes, RewardAdapter
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import LoraSettings
from branchtree.recipe.build import (
    make_credit_rule,
    make_draws,
    make_edge_rules,
    make_forward_loss,
    make_sampler,
    most_noise,
    planned_steps,
)
from branchtree.recipe.schema import OptimSection, Recipe
from branchtree.run.directory import RunDirectory
from branchtree.run.resume import find_checkpoint
from branchtree.run.start import load_start
from branchtree.training.conditioning import open_cache
from branchtree.training.engine import Engine, WeightAverage
from branchtree.training.evaluation import Evaluator, Figure
from branchtree.training.failures import FailureWatch
from branchtree.training.forward import ForwardObjective
from branchtree.training.gating import make_gate
from branchtree.training.inputs import Inputs
from branchtree.training.learning_rate import LearningRate
from branchtree.training.limits import RowLimits
from branchtree.training.objective import Objective
from branchtree.training.path import PathObjective
from branchtree.training.policy import Policy
from branchtree.training.probing import refuse_group_rewards
from branchtree.training.processes import Team, make_team, process_group, refuse_whole_groups
from branchtree.training.session import Session
from branchtree.training.sharding import make_engine
from branchtree.training.splitting import make_split_learner
from branchtree.training.trained import Trained, restore_weights
from branchtree.training.update import UpdateGuard, Updater

log = logging.getLogger("branchtree")


def open_session(inputs: Inputs, output: RunDirectory, accelerator: Any, checkpoint: Path | None = None) -> Session:
    """Load the model and the rewards, and prepare the optimiser.

    ``checkpoint`` is one to take the weights from: before they are sharded, after the start policy was set aside.
    """
    recipe, model = inputs.recipe, inputs.model
    team = make_team(recipe, inputs.schedule, accelerator)
    # Rewards first: they are the smaller download, and one that is missing is named before the model's begins.
    load_rewards([*inputs.rewards, *inputs.held_out], model.modality, accelerator.device)
    refuse_whole_groups(team, inputs.rewards)
    refuse_group_rewards(recipe.credit.baseline, inputs.rewards)
    load_model(recipe, model, accelerator.device)
    # Without a start of its own, a LoRA's start policy is the model with it switched off.
    kept = not recipe.lora or recipe.model.start is not None
    compared = bool(recipe.loss.kl or recipe.loss.kl_every) and kept
    reference = frozen_copy(model.denoiser) if compared else None
    old = frozen_copy(model.denoiser) if recipe.loss.is_forward and recipe.loss.old_policy == "ema" else None
    for denoiser in (model.denoiser, reference, old):
        if denoiser is not None and recipe.run.compile is not None:
            compile_denoiser(model, denoiser, recipe.run.compile)
    cache = open_cache(recipe.run, model, accelerator.device)
    policy = Policy(model, cache, make_sampler(recipe, model), recipe.autocast, accelerator.device)
    base = None
    if checkpoint is not None:
        base = _missing_base(inputs, output, policy, accelerator)
        restore_weights(checkpoint, model, None)
    engine = make_engine(recipe, accelerator, model.denoiser, reference, partial(_make_optimizer, recipe.optim))
    objective = make_objective(recipe, policy)
    if isinstance(objective, ForwardObjective):
        refuse_apart(recipe, objective.rule, team, engine)
    scheduler = LearningRate(engine.optimizer, recipe.optim, planned_steps(recipe))
    limits = _row_limits(inputs, accelerator, engine.joint)
    average = WeightAverage(engine.parameters, recipe.optim.ema) if recipe.optim.ema else None
    guard = UpdateGuard(recipe.optim)
    order = PromptOrder(len(inputs.conditions), recipe.seed, recipe.data.shuffle)
    splits = make_split_learner(inputs.schedule, order, recipe.batch.prompts, most_noise(recipe.sampler))
    return Session(
        inputs=inputs,
        output=output,
        accelerator=accelerator,
        team=team,
        policy=replace(policy, limit=limits.rollout),
        limits=limits,
        updater=Updater(
            accelerator=accelerator,
            engine=engine,
            scheduler=scheduler,
            objective=objective,
            max_grad_norm=recipe.optim.max_grad_norm,
            limit=limits.update,
            guard=guard,
            average=average,
            remedy=partial(step_shortage, recipe),
        ),
        trained=Trained(model, engine, scheduler, average, guard, splits, make_gate(recipe.loss, inputs.rewards)),
        evaluator=_make_evaluator(inputs, policy, limits, engine.joint),
        failures=FailureWatch(recipe.scoring, {reward.label for reward in inputs.rewards if reward.weight == 0}),
        order=order,
        credit_rule=make_credit_rule(recipe),
        reference=reference,
        old=old,
        checkpoint=checkpoint,
        base=base,
    )


def make_objective(recipe: Recipe, policy: Policy) -> Objective[Any]:
    """Return what a recipe's gradient pass minimises."""
    sampler, forward = policy.sampler, make_forward_loss(recipe)
    if forward is None:
        return PathObjective(sampler, recipe.loss, policy.device, make_edge_rules(recipe))
    prediction = next((known for known in get_args(Prediction) if known == policy.model.prediction), None)
    if prediction is None:
        raise RecipeError(
            f"loss.kind: a forward objective is for models that predict {', '.join(get_args(Prediction))}, and this "
            f"one predicts {policy.model.prediction}; set it to path"
        )
    return ForwardObjective(recipe.loss, forward, make_draws(recipe), sampler.sigmas, prediction, policy.device)


def refuse_apart(recipe: Recipe, rule: ForwardLoss, team: Team, engine: Engine) -> None:
    """Raise RecipeError if a forward objective needs what is spread over processes: averaged weights, or groups."""
    loss = recipe.loss
    if loss.old_policy == "ema" and engine.joint:
        raise RecipeError(
            "loss.old_policy: ema needs a second copy of all weights, and here they are sharded; set it to rollout, or "
            "do not shard them"
        )
    follows = recipe.optim.steps_per_iteration > 1 or loss.old_policy == "ema"
    if rule.centred and follows and (team.members > 1 or engine.joint):
        spread = "weights are sharded" if engine.joint else f"{team.members} processes share each prompt's leaves"
        raise RecipeError(
            f"loss.kind: '{loss.name}' compares leaves with their group's mean, which is not computed where {spread}, "
            "and needs none only in an iteration's first step against the rollout's policy; set "
            "optim.steps_per_iteration to 1 and loss.old_policy to rollout"
        )


def make_accelerator(recipe: Recipe) -> Any:
    """accelerate's engine for the recipe. Raises RecipeError for a tracker that is not installed."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in recipe.run.trackers:
        if tracker not in available:
            raise RecipeError(f"run.trackers: '{tracker}' is not installed; installed: {', '.join(sorted(available))}")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.backends.cuda.matmul.allow_tf32 = recipe.run.tf32
    torch.backends.cudnn.allow_tf32 = recipe.run.tf32
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        # Its engine steps inside the backward pass, before an update can be refused, and casts the model on its own.
        raise RecipeError(
            "accelerate's configuration: distributed_type DEEPSPEED is not supported; recipes/accelerate/zero2.yaml "
            "shards what ZeRO-2 shards, and fsdp2.yaml what ZeRO-3 does"
        )
    accelerator = Accelerator(
        # Set because several processes without a GPU would otherwise each train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # the policy casts on its own; accelerate has one precision for all runs of a process
        # Buffers are constants. To send them before a forward would take as many forwards in every process.
        kwargs_handlers=[process_group(recipe.run.timeout), DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    for state in (PartialState(), accelerator.state):
        state.device = indexed(state.device)  # a process that is alone is given CUDA without an index
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            "accelerate's configuration: gradient_accumulation_steps must be 1; the recipe's batch.prompts and "
            "batch.update_rows say how gradients are summed up"
        )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise RecipeError(f"{expected} processes were started, but accelerate joined {accelerator.num_processes}")
    return accelerator


def load_model(recipe: Recipe, model: ModelAdapter, device: torch.device) -> None:
    """Load the model in the recipe's precision, ready to be trained: all its weights, or low-rank ones.

    They are the model's own, or fresh, unless the recipe names others to start from.
    """
    reduced = torch.bfloat16 if recipe.run.precision == "bf16" else torch.float32
    # Weights that are trained stay in float32; those that LoRA freezes need not.
    denoiser_dtype = reduced if recipe.lora else torch.float32
    if recipe.model.quantize is not None and isinstance(model, Quantizes):
        model.load(device, reduced, denoiser_dtype, recipe.model.quantize)
    else:
        model.load(device, reduced, denoiser_dtype)
    model.denoiser.eval()
    if recipe.lora:
        alpha = 2.0 * recipe.lora.rank if recipe.lora.alpha is None else recipe.lora.alpha
        model.add_lora(LoraSettings(recipe.lora.rank, alpha, recipe.lora.targets), recipe.seed)
    else:
        train_all(model)
    if recipe.model.start is not None:
        load_start(model, Path(recipe.model.start))
    if recipe.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()


def train_all(model: ModelAdapter) -> None:
    """Have all weights of a loaded model's denoiser trained that have an effect."""
    model.denoiser.requires_grad_(True)
    if isinstance(model, FreezesUnused):
        model.freeze_unused()


def compile_denoiser(model: ModelAdapter, denoiser: nn.Module, backend: str) -> None:
    """Compile a denoiser's blocks. Raises ModelError if the model's adapter cannot."""
    if not isinstance(model, CompilesBlocks):
        raise ModelError(f"run.compile: the adapter {type(model).__name__} cannot compile its model; leave it out")
    model.compile_blocks(denoiser, backend)


def load_rewards(rewards: Sequence[NamedReward], modality: str, device: torch.device) -> None:
    """Load each adapter once. Raises RewardError, naming the reward, if one fails or cannot score the modality."""
    loaded: list[RewardAdapter] = []
    for reward in rewards:
        if any(reward.adapter is adapter for adapter in loaded):
            continue
        loaded.append(reward.adapter)
        try:
            reward.adapter.load(device)
        except Exception as error:  # a plug-in can raise anything; name it
            raise RewardError(f"reward '{reward.label}' cannot be loaded: {reason_of(error)}") from error
        if modality not in reward.adapter.modalities:  # which one that is served elsewhere learns only now
            scored = ", ".join(sorted(reward.adapter.modalities))
            raise RewardError(f"reward '{reward.label}' scores {scored}, but the model makes {modality}s")


def frozen_copy(denoiser: nn.Module) -> nn.Module:
    """Return a frozen copy of a denoiser as it is now, with its own trained weights and the frozen ones in common."""
    shared: dict[int, object] = {id(value): value for value in denoiser.parameters() if not value.requires_grad}
    return copy.deepcopy(denoiser, shared).requires_grad_(False)


def _make_optimizer(section: OptimSection, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


def _row_limits(inputs: Inputs, accelerator: Any, joint: bool) -> RowLimits:
    """The recipe's limits; on a GPU those that it leaves open start from the plan's estimate of what fits."""
    recipe = inputs.recipe
    limits = RowLimits(recipe.batch, recipe.evaluation.rows if recipe.evaluation else None, joint)
    memory = None if accelerator.device.type == "cpu" else device_memory()
    if memory is not None:
        limits.start_at(TrainingNeed.of(recipe, inputs.model).open_limits(int(memory.total * USABLE)))
    return limits


def _make_evaluator(inputs: Inputs, policy: Policy, limits: RowLimits, joint: bool) -> Evaluator | None:
    """Return the evaluator of the recipe's ``evaluation`` section; None without one."""
    section = inputs.recipe.evaluation
    if section is None:
        return None
    limited = replace(policy, limit=limits.evaluation)
    overlap = inputs.recipe.scoring.overlap
    return Evaluator(section, inputs.held_out_conditions, inputs.held_out, limited, limits, overlap, joint)


def _missing_base(inputs: Inputs, output: RunDirectory, policy: Policy, accelerator: Any) -> dict[str, Figure] | None:
    """Evaluate the start policy, before a checkpoint's weights are read, unless the run has its figures already.

    Figures of other prompts or rewards do not count. All processes must call this.
    """
    from accelerate.utils import broadcast_object_list

    evaluator = _make_evaluator(inputs, policy, _row_limits(inputs, accelerator, False), False)
    if evaluator is None:
        return None
    lacking = [accelerator.is_main_process and not output.evaluated(0, inputs.identity)]
    broadcast_object_list(lacking)
    if not lacking[0]:
        return None
    if accelerator.is_main_process:
        log.warning("the run has no held-out figures of these prompts and rewards: evaluating the start policy")
    return evaluator.figures(accelerator)


def agreed_checkpoint(
    accelerator: Any, folder: Path, inputs: Inputs, allow: Sequence[str], iteration: int | None = None
) -> Path | None:
    """``find_checkpoint`` as the main process sees the folder; it gives the same, or fails, on all."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find_checkpoint(folder, inputs.recipe, allow, inputs.contents, iteration)
        except BranchTreeError as error:
            found[1] = error
    path, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return None if path is None else Path(path)
