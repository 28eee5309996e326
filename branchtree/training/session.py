"""A run, ready to go: what an iteration works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.core.credit import Credit, CreditRule, assign_credit
from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import Growth, Sampler
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.data.prompts import PromptOrder
from branchtree.plugins.protocols import ReleasesMemory
from branchtree.plugins.values import Condition
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import FAILURES, RunDirectory
from branchtree.training.evaluation import Evaluator, Figure
from branchtree.training.failures import FailureWatch
from branchtree.training.inputs import Inputs
from branchtree.training.limits import RowLimits
from branchtree.training.objective import Policies, Work
from branchtree.training.policy import Policy
from branchtree.training.processes import Processes, Team
from branchtree.training.scoring import Scorer
from branchtree.training.trained import Trained
from branchtree.training.update import Updater


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
        every = self.recipe.run.tree_every
        return self.team.index == 0 and every is not None and iteration % every == 0

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
        """Return the credit of some consecutive prompts' trees; a prompt's is the same with and without others.

        ``topology`` and ``log_prob``, means over ``dimensions``, are of all prompts, ``scores`` of these. See
        ``assign_credit``.
        """
        own = [
            level[block.start : block.stop]
            for level, block in zip(log_prob, (topology.block(prompts, d) for d in topology.depths), strict=True)
        ]
        weights = {reward.label: reward.weight for reward in self.inputs.rewards}
        return assign_credit(topology.select(prompts), own, scores, weights, self.credit_rule, iteration, dimensions)

    def work(self, credit: Credit, topology: Topology, prompts: range, ids: Sequence[int], iteration: int) -> Work:
        """Return what the gradient pass does for some consecutive prompts, by their indices in all trees.

        ``credit`` is of these prompts; ``topology`` and ``ids`` (P,), the addresses for noise, are of all.
        """
        own = ids[prompts.start : prompts.stop]
        work: Work = self.updater.objective.work(credit, topology.select(prompts), own, iteration)
        return work.within(topology, prompts.start)

    @property
    def learns_early(self) -> bool:
        """Return whether the gradient pass can begin with the prompts that are scored first.

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
