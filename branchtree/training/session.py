"""A run, ready to go: what an iteration works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.core.advantages import advantage_moments, batch_normalised
from branchtree.core.credit import Credit, CreditRule, assign_credit, trainable
from branchtree.core.gate import Gate
from branchtree.core.noise import NoiseSource
from branchtree.core.probes import ProbeScores
from branchtree.core.rollout import Growth, Sampler
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.data.prompts import PromptOrder
from branchtree.plugins.protocols import ReleasesMemory
from branchtree.plugins.scores import NamedReward
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
    old: nn.Module | None  # a frozen copy for the averaged weights, where a forward objective compares with them
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

    def plans(self, iteration: int) -> Sequence[TreePlan]:
        """Return the plans of their trees."""
        learner, prompts = self.trained.splits, self.recipe.batch.prompts
        if learner is not None:
            return learner.plans(iteration)[self.team.prompts(prompts)]
        return [self.inputs.schedule.plan(iteration, prompt_id) for prompt_id in self.prompt_ids(iteration)]

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
            clean=self.updater.objective.clean,
        )

    def scorer(self, background: bool = True, rewards: Sequence[NamedReward] | None = None) -> Scorer:
        """Return what decodes and scores leaves, by all rewards or some, in the background where allowed.

        On a GPU decoding would only take turns with the rollout, and their memory would add up: there it has no thread.
        """
        inputs, limits, overlap = self.inputs, self.limits, background and self.recipe.scoring.overlap
        decoding = overlap and self.device.type == "cpu"
        chosen = inputs.rewards if rewards is None else rewards
        return Scorer(inputs.model, chosen, limits, limits.decode, self.device, overlap, decoding)

    def credit(
        self,
        topology: Topology,
        log_prob: Sequence[Tensor],
        scores: Mapping[str, Scores],
        prompts: range,
        dimensions: int,
        iteration: int,
        probes: Mapping[str, ProbeScores] | None = None,
        gate: Gate | None = None,
    ) -> Credit:
        """Return the credit of some consecutive prompts' trees; a prompt's is the same with and without others.

        ``topology``, ``log_prob``, means over ``dimensions``, ``probes`` and ``gate`` are of all prompts, ``scores`` of
        these. See ``assign_credit``.
        """
        blocks = [topology.block(prompts, depth) for depth in topology.depths]

        def own(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(level[block.start : block.stop] for level, block in zip(levels, blocks, strict=True))

        weights = {reward.label: reward.weight for reward in self.inputs.rewards}
        probed = {label: own(levels) for label, levels in (probes or {}).items()}
        rule, chosen = self.credit_rule, topology.select(prompts)
        pulled = None if gate is None else own(gate)
        return assign_credit(chosen, own(log_prob), scores, weights, rule, iteration, dimensions, probed, pulled)

    def gate(self, topology: Topology, scores: Mapping[str, Scores]) -> Gate | None:
        """Return how far the KL term acts on each edge of the team's whole trees, where the recipe has a gate for it.

        All processes call this together.
        """
        gate = self.trained.gate
        return None if gate is None else gate.open(self.processes, self.team, topology, scores)

    def batch_normalised(self, credit: Credit, topology: Topology) -> Credit:
        """Return the credit of all prompts of this process, normalised over those of all, where the recipe asks for it.

        All processes call this together.
        """
        section = self.recipe.credit
        if not section.batch_normalise:
            return credit
        trained = trainable(topology, credit.valid, self.credit_rule)
        mine = advantage_moments(topology, credit.advantages, trained)
        teams = self.processes.everyone(mine)[:: self.team.members]
        return replace(credit, advantages=batch_normalised(credit.advantages, torch.cat(teams), section.eps))

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

        Not where the families of a step are drawn from all prompts, where leaves of all are ranked, where advantages
        are normalised over all or probes come first, where processes must know each other's scores first, or where a
        reward on the same GPU is to make room for the gradient pass.
        """
        alone = self.team.members == 1 and not self.updater.engine.joint
        beside = self.device.type == "cpu" or not any(
            isinstance(reward.adapter, ReleasesMemory) for reward in self.inputs.rewards
        )
        recipe = self.recipe
        probed = recipe.credit.baseline == "probe"
        ranked = recipe.credit.batch_normalise or recipe.loss.gate is not None
        waits = ranked or probed or recipe.optim.steps_per_iteration > 1
        return alone and beside and not waits

    def policies(self, policy: Policy, iteration: int) -> Policies:
        """Return what a gradient pass compares: the policy that is trained, the averaged one where a forward objective
        needs it, and the start policy where the KL does.

        The start policy is a frozen copy, or the model without its LoRA.
        """
        trained, loss, model = policy.training(self.updater.engine.module), self.recipe.loss, self.inputs.model
        old = None
        if self.old is not None and self.updater.average is not None:
            self.updater.average.copy_to(self.old)
            old = policy.training(self.old)
        if loss.kl == 0 and (loss.kl_every is None or iteration % loss.kl_every):
            return Policies(trained, None, old)
        frozen = policy.training(self.reference)
        if self.reference is not None:
            return Policies(trained, frozen, old)

        def without_lora(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            with model.without_lora(model.denoiser):
                return frozen(latents, sigma, prompt)

        return Policies(trained, without_lora, old)
