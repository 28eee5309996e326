"""Everything a run needs, built in the order in which mistakes are cheapest to find."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.core.credit import Credit, CreditRule, PruningRule, assign_credit
from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import Growth, Sampler
from branchtree.core.schedule import Schedule
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.data.prompts import PromptOrder, check_conditions, held_out_conditions, training_conditions
from branchtree.errors import ModelError, RecipeError, RewardError, reason_of
from branchtree.planning.devices import indexed
from branchtree.planning.gpus import USABLE, device_memory
from branchtree.planning.preflight import TrainingNeed, step_shortage
from branchtree.plugins.base import Callback
from branchtree.plugins.protocols import CompilesBlocks, ModelAdapter, ReleasesMemory, RewardAdapter
from branchtree.plugins.values import Condition, LoraSettings
from branchtree.recipe.build import (
    NamedReward,
    check_learns,
    make_callbacks,
    make_credit_rule,
    make_edge_loss,
    make_kernel,
    make_model,
    make_pruning_rule,
    make_rewards,
    make_sampler,
    make_schedule,
    planned_steps,
)
from branchtree.recipe.schema import OptimSection, Recipe
from branchtree.run.contents import Contents, evaluation_identity, read_contents
from branchtree.run.directory import FAILURES, RunDirectory
from branchtree.training.checkpoint import Trained, restore_weights
from branchtree.training.conditioning import open_cache
from branchtree.training.engine import WeightAverage
from branchtree.training.evaluation import Evaluator, Figure
from branchtree.training.failures import FailureWatch
from branchtree.training.learning_rate import LearningRate
from branchtree.training.limits import RowLimits
from branchtree.training.policy import Policy
from branchtree.training.processes import Processes, Team, make_team, process_group, refuse_whole_groups
from branchtree.training.scoring import Scorer
from branchtree.training.sharding import make_engine
from branchtree.training.start import frozen_copy, load_start
from branchtree.training.update import Objective, Policies, UpdateGuard, Updater

log = logging.getLogger("branchtree")


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, checked and read, before any model is loaded."""

    recipe: Recipe
    model: ModelAdapter
    rewards: list[NamedReward]
    held_out: list[NamedReward]
    conditions: list[Condition]
    held_out_conditions: list[Condition]
    schedule: Schedule
    callbacks: list[Callback]

    @cached_property
    def contents(self) -> Contents:
        """Digests of the files that the run reads, as they were when this was first asked for."""
        return read_contents(self.recipe, self.conditions, self.held_out_conditions)

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """What held-out figures depend on but the trained weights; None without an evaluation."""
        if self.recipe.evaluation is None:
            return None
        return evaluation_identity(self.recipe, self.held_out, len(self.held_out_conditions), self.contents)


def read_inputs(recipe: Recipe) -> Inputs:
    """Look up plug-ins, read prompts and have the model check them. Raises a BranchTreeError naming what is wrong."""
    model = make_model(recipe)
    make_kernel(recipe.sampler, model.prediction)  # refuses early what does not suit the model
    check_learns(recipe)
    section = recipe.evaluation
    rewards = make_rewards(recipe.rewards, ("rewards",), model.modality)
    built = {reward.described: reward.adapter for reward in rewards}
    held_out = make_rewards(section.rewards, ("evaluation", "rewards"), model.modality, built) if section else []
    conditions, unseen = training_conditions(recipe.data, model), held_out_conditions(section, model)
    check_conditions(model, [*conditions, *unseen])
    return Inputs(
        recipe=recipe,
        model=model,
        rewards=rewards,
        held_out=held_out,
        conditions=conditions,
        held_out_conditions=unseen,
        schedule=make_schedule(recipe),
        callbacks=make_callbacks(recipe.callbacks),
    )


@dataclass(frozen=True)
class Session:
    """A run, ready to go."""

    inputs: Inputs
    output: RunDirectory
    accelerator: Any
    team: Team
    policy: Policy  # that is trained, under no prompts yet
    limits: RowLimits
    updater: Updater
    trained: Trained
    evaluator: Evaluator | None
    failures: FailureWatch
    order: PromptOrder
    credit_rule: CreditRule
    pruning_rule: PruningRule
    reference: nn.Module | None  # a frozen copy of the start policy, where KL needs one
    checkpoint: Path | None  # the one that the weights were taken from
    base: dict[str, Figure] | None  # held-out figures of the start policy, where a run that goes on had none

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.inputs.recipe

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def sampler(self) -> Sampler:
        """How transitions are made and scored."""
        return self.policy.sampler

    @property
    def processes(self) -> Processes:
        """The processes of the run, as far as they must keep in step."""
        return Processes(self.accelerator, self.updater.engine.joint)

    def prompt_ids(self, iteration: int) -> Sequence[int]:
        """Return the addresses of the prompts that this process, or its team, works on."""
        prompts = self.recipe.batch.prompts
        return self.order.batch(iteration, prompts)[self.team.prompts(prompts)]

    def conditions(self, iteration: int) -> list[Condition]:
        """Return these prompts' conditions."""
        return [self.inputs.conditions[self.order.index(prompt_id)] for prompt_id in self.prompt_ids(iteration)]

    @property
    def first_prompt(self) -> int:
        """The index of this process's first prompt among those of an iteration."""
        return int(self.team.prompts(self.recipe.batch.prompts).start)

    def records_tree(self, iteration: int) -> bool:
        """Return whether the first prompt's tree is written down at this iteration, leaves and all."""
        return self.team.index == 0 and iteration % self.recipe.run.tree_every == 0

    def log_failure(self, iteration: int, row: Mapping[str, Any]) -> None:
        """Write down a sample that could not be scored, or a reward that failed and ends the run."""
        if self.accelerator.is_main_process:
            self.output.append(FAILURES, {"iteration": iteration, **row})

    def grow(self, policy: Policy, topology: Topology, ids: Sequence[int], iteration: int) -> Growth:
        """Return the iteration's trees, ready to be grown; ``ids`` (P,) are the prompts' addresses for noise."""
        recipe = self.recipe
        return Growth(
            policy,
            self.sampler,
            topology,
            policy.initial(recipe.tree.noise_seed, iteration, [(prompt_id, 0) for prompt_id in ids]),
            NoiseSource(recipe.seed, iteration),
            ids,
            max_rows=self.limits.rollout.rows,
            store=torch.device("cpu") if recipe.batch.states == "host" else None,
            together=recipe.batch.rollout_prompts,
        )

    def scorer(self, background: bool = True) -> Scorer:
        """Return what decodes and scores leaves; in the ``background`` where the recipe allows it.

        On a GPU decoding would only take turns with the rollout, and their memory would add up: there it has no thread.
        """
        inputs, limits, overlap = self.inputs, self.limits, background and self.recipe.scoring.overlap
        decoding = overlap and self.device.type == "cpu"
        return Scorer(inputs.model, inputs.rewards, limits, limits.decode, self.device, overlap, decoding)

    def credit(
        self,
        topology: Topology,
        log_prob: Sequence[Tensor],
        scores: Mapping[str, Scores],
        prompts: range,
        dimensions: int,
        iteration: int,
    ) -> Credit:
        """Return the credit of some adjoining prompts' trees; a prompt's is the same with and without others.

        ``topology`` and ``log_prob``, means over ``dimensions``, are of all prompts, ``scores`` of these. See
        ``assign_credit``.
        """
        own = [
            level[block.start : block.stop]
            for level, block in zip(log_prob, (topology.block(prompts, d) for d in topology.depths), strict=True)
        ]
        weights = {reward.label: reward.weight for reward in self.inputs.rewards}
        rules = self.credit_rule, self.pruning_rule
        return assign_credit(topology.select(prompts), own, scores, weights, *rules, iteration, dimensions)

    @property
    def learns_early(self) -> bool:
        """Whether the gradient pass can begin with the prompts that are scored first.

        Not where the families of a step are drawn from all prompts, where processes must know each other's scores
        first, or where a reward on the same GPU is to make room for the gradient pass.
        """
        alone = self.team.members == 1 and not self.updater.engine.joint
        beside = self.device.type == "cpu" or not any(
            isinstance(reward.adapter, ReleasesMemory) for reward in self.inputs.rewards
        )
        return alone and beside and self.recipe.optim.steps_per_iteration == 1

    def policies(self, policy: Policy, iteration: int) -> Policies:
        """Return what a gradient pass compares: the policy that is trained, and the start policy where the KL needs it.

        The start policy is a frozen copy, or the model without its LoRA.
        """
        trained, loss, model = policy.training(self.updater.engine.module), self.recipe.loss, self.inputs.model
        if loss.kl == 0 and (loss.kl_every is None or iteration % loss.kl_every):
            return Policies(trained, None)
        frozen = policy.training(self.reference)
        if self.reference is not None:
            return Policies(trained, frozen)

        def without_lora(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            with model.without_lora(model.denoiser):
                return frozen(latents, sigma, prompt)

        return Policies(trained, without_lora)


def open_session(inputs: Inputs, output: RunDirectory, accelerator: Any, checkpoint: Path | None = None) -> Session:
    """Load the model and the rewards, and prepare the optimiser.

    ``checkpoint`` is one to take the weights from: before they are sharded, after the start policy was set aside.
    """
    recipe, model = inputs.recipe, inputs.model
    team = make_team(recipe, inputs.schedule, accelerator)
    # Rewards first: they are the smaller download, and one that is missing is named before the model's begins.
    load_rewards([*inputs.rewards, *inputs.held_out], model.modality, accelerator.device)
    refuse_whole_groups(team, inputs.rewards)
    load_model(recipe, model, accelerator.device)
    # Without a start of its own, a LoRA's start policy is the model with it switched off.
    kept = not recipe.lora or recipe.model.start is not None
    compared = bool(recipe.loss.kl or recipe.loss.kl_every) and kept
    reference = frozen_copy(model.denoiser) if compared else None
    for denoiser in (model.denoiser, reference):
        if denoiser is not None and recipe.run.compile is not None:
            compile_denoiser(model, denoiser, recipe.run.compile)
    cache = open_cache(recipe.run, model, accelerator.device)
    policy = Policy(model, cache, make_sampler(recipe, model), accelerator.autocast, accelerator.device)
    base = None
    if checkpoint is not None:
        base = _missing_base(inputs, output, policy, accelerator)
        restore_weights(checkpoint, model, None)
    engine = make_engine(recipe, accelerator, model.denoiser, reference, partial(_make_optimizer, recipe.optim))
    scheduler = LearningRate(engine.optimizer, recipe.optim, planned_steps(recipe))
    limits = _row_limits(inputs, accelerator, engine.joint)
    average = WeightAverage(engine.parameters, recipe.optim.ema) if recipe.optim.ema else None
    guard = UpdateGuard(recipe.optim)
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
            objective=Objective(policy.sampler, recipe.loss, accelerator.device, make_edge_loss(recipe)),
            max_grad_norm=recipe.optim.max_grad_norm,
            limit=limits.update,
            guard=guard,
            average=average,
            remedy=partial(step_shortage, recipe),
        ),
        trained=Trained(model, engine, scheduler, average, guard),
        evaluator=_make_evaluator(inputs, policy, limits, engine.joint),
        failures=FailureWatch(recipe.scoring, {reward.label for reward in inputs.rewards if reward.weight == 0}),
        order=PromptOrder(len(inputs.conditions), recipe.seed, recipe.data.shuffle),
        credit_rule=make_credit_rule(recipe),
        pruning_rule=make_pruning_rule(recipe),
        reference=reference,
        checkpoint=checkpoint,
        base=base,
    )


def make_accelerator(recipe: Recipe) -> Any:
    """accelerate's engine for the recipe. Raises RecipeError for a tracker that is not installed."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
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
        # Its engine steps inside the backward pass, before an update can be refused, and casts the model by itself.
        raise RecipeError(
            "accelerate's configuration: distributed_type DEEPSPEED is not supported; recipes/accelerate/zero2.yaml "
            "shards what ZeRO-2 shards, and fsdp2.yaml what ZeRO-3 does"
        )
    # accelerate keeps its precision in a process-wide state; a second run in one process may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        # Told so only because several processes without a GPU would otherwise each train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.autocast else "no",
        kwargs_handlers=[process_group(recipe.run.timeout)],
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
    model.load(device, dtype=reduced, denoiser_dtype=reduced if recipe.lora else torch.float32)
    model.denoiser.eval()
    if recipe.lora:
        alpha = 2.0 * recipe.lora.rank if recipe.lora.alpha is None else recipe.lora.alpha
        model.add_lora(LoraSettings(recipe.lora.rank, alpha, recipe.lora.targets), recipe.seed)
    else:
        model.denoiser.requires_grad_(True)
    if recipe.model.start is not None:
        load_start(model, Path(recipe.model.start))
    if recipe.run.gradient_checkpointing:
        model.enable_gradient_checkpointing()


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
