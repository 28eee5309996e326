"""The gradient pass: clipped policy-gradient steps over the families of a scored tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from branchtree.families import Families, FamilyBatch, gather
from branchtree.loss import clipped_away, clipped_loss, probability_ratio
from branchtree.noise import Purpose, generator
from branchtree.protocols import VelocityFunction
from branchtree.recipe.schema import LossSection
from branchtree.rollout import Sampler, chunks
from branchtree.training.ema import WeightAverage
from branchtree.training.engine import Engine
from branchtree.training.guard import UpdateGuard
from branchtree.training.lockstep import Lockstep
from branchtree.training.microbatch import RowLimit, ran_out_of_memory
from branchtree.transitions import GaussianTransition
from branchtree.tree import BranchTree


@dataclass
class UpdateRecord:
    """What one process saw in the gradient pass of an iteration."""

    rows: int = 0
    rescored_rows: int = 0
    reference_rows: int = 0
    steps: int = 0
    skipped_steps: int = 0  # no edge was trained on any process
    refused_steps: int = 0  # the gradient was not finite, or too large
    grad_norms: list[float] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)  # (E,) per batch
    kl: list[Tensor] = field(default_factory=list)  # (E,)
    deviation: list[Tensor] = field(default_factory=list)  # (E,) |rho - 1|
    first_deviation: list[Tensor] = field(default_factory=list)  # the same at the first optimiser step
    clipped: list[Tensor] = field(default_factory=list)  # (E,) bool
    mismatch: list[Tensor] = field(default_factory=list)  # (E,) |log p rollout - log p training|, same weights
    depth: list[Tensor] = field(default_factory=list)  # (E,) of the child

    def add(self, other: UpdateRecord) -> None:
        """What was seen after this."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True)
class Policies:
    """The velocity functions of one iteration's prompts."""

    trained: VelocityFunction
    reference: VelocityFunction | None  # the frozen start policy, where there is a KL term


@dataclass(frozen=True)
class _Step:
    """One optimiser step's work."""

    tree: BranchTree
    policies: Policies
    families: Families
    edges: int  # of all processes
    joins: int  # backwards without an edge of this process's own, which only the others need
    old: Tensor | None  # densities (E,) before the iteration's first step, where they were computed again
    first: bool  # of the iteration: the weights are those of the rollout


@dataclass(frozen=True)
class Updater:
    """Takes the optimiser steps of an iteration. ``accelerator`` is accelerate's."""

    accelerator: Any
    engine: Engine
    scheduler: Any
    sampler: Sampler
    loss: LossSection
    max_grad_norm: float
    limit: RowLimit  # of families per forward
    guard: UpdateGuard
    average: WeightAverage | None

    @property
    def optimizer(self) -> Any:
        """The engine's optimiser."""
        return self.engine.optimizer

    def run(self, tree: BranchTree, parts: Sequence[Families], policies: Policies, iteration: int) -> UpdateRecord:
        """One optimiser step per part. Raises BranchTreeError if too many in a row would do harm."""
        record = UpdateRecord()
        work = self._shared_work(parts)
        # Families of later steps are scored against the weights of the rollout before the first step changes them.
        old = [
            self._rescored(tree, part, policies, record, joins) if index else None
            for index, (part, (_, joins)) in enumerate(zip(parts, work, strict=True))
        ]
        for part, (edges, joins), old_log_prob in zip(parts, work, old, strict=True):
            if edges == 0:
                record.skipped_steps += 1
                continue
            # Gradients are reduced in a backward, so even a process without an edge needs one.
            needed = max(joins, 0 if len(part) else 1)
            step = _Step(tree, policies, part, edges, needed, old_log_prob, first=record.steps == 0)
            record.add(self._gradient(step))
            self._take(record, iteration)
        return record

    def _shared_work(self, parts: Sequence[Families]) -> list[tuple[int, int]]:
        """Of each part, the edges of all processes, and how many forwards other processes make more than this one."""
        mine = [count for part in parts for count in (part.edges, len(chunks(len(part), self.limit.rows)))]
        everyone = Lockstep(self.accelerator, self.engine.joint).counts(mine).reshape(-1, len(parts), 2)
        edges = everyone[:, :, 0].sum(0).tolist()
        batches = everyone[:, :, 1].amax(0).tolist() if self.engine.joint else mine[1::2]
        return [(total, most - own) for total, most, own in zip(edges, batches, mine[1::2], strict=True)]

    def _take(self, record: UpdateRecord, iteration: int) -> None:
        """Clip the gradient and take the optimiser's step, unless it would do harm."""
        norm = self.engine.clip(self.max_grad_norm)
        if not self.guard.admits(norm, iteration):
            self.engine.discard()
            record.refused_steps += 1
            return
        self.engine.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update()
        record.steps += 1
        record.grad_norms.append(norm)

    def _gradient(self, step: _Step) -> UpdateRecord:
        """Accumulate a step's gradient, and tell what was seen.

        Where memory runs out, what has been accumulated may end in the middle of a batch: the step begins again, in
        smaller batches. Raises DeviceMemoryError where it cannot.
        """
        while True:
            seen = UpdateRecord()
            failure = self._accumulate(step, seen)
            if failure is None:
                return seen
            self.engine.discard()
            self.limit.shrink(*failure)

    def _accumulate(self, step: _Step, seen: UpdateRecord) -> tuple[int, str] | None:
        """Add the gradient of every batch; where one does not fit in memory, returns its rows and the reason."""
        batches = [*self._batches(step.families), *[None] * step.joins]
        done = 0
        for index, families in enumerate(batches):
            last, edges = index == len(batches) - 1, families.edges if families else 0
            old = None if step.old is None else step.old[done : done + edges]
            done += edges
            try:
                with self.engine.accumulating(last):
                    self.engine.backward(self._loss(step, families, old, seen))
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                rows = len(families) if families else 1
                if last and self.accelerator.num_processes > 1:
                    self.limit.refuse(rows, str(error))  # the others wait in the middle of a reduction
                return rows, str(error)
        return None

    def _loss(self, step: _Step, families: Families | None, old: Tensor | None, seen: UpdateRecord) -> Tensor:
        """What one batch adds to the loss: the mean over the edges of all processes, over which the engine averages."""
        if families is None:
            return self._loss_without_edges(step.tree, step.policies)
        batch = gather(step.tree, families, self.accelerator.device)
        losses = self._losses(batch, step.policies, old, seen, step.first)
        total: Tensor = losses.sum() * self.accelerator.num_processes / step.edges
        return total

    @cached_property
    def _noise_weights(self) -> Tensor:
        """Weights of the steps, (T,)."""
        return self.sampler.noise_weights()

    def _batches(self, families: Families) -> list[Families]:
        spans = chunks(len(families), self.limit.rows)
        return [families.select(torch.arange(span.start, span.stop)) for span in spans]

    def _loss_without_edges(self, tree: BranchTree, policies: Policies) -> Tensor:
        """A loss whose gradient is zero, from the same forwards as a batch's."""
        latents = tree.states[0][:1].to(self.accelerator.device)
        sigma, root = tree.sigmas[:1].to(latents.device), torch.zeros(1, dtype=torch.int64, device=latents.device)
        prediction = policies.trained(latents, sigma, root)
        if policies.reference is not None and self.engine.joint:
            with torch.no_grad():
                policies.reference(latents, sigma, root)
        return prediction.sum() * 0

    def _transition(self, velocity: VelocityFunction, batch: FamilyBatch) -> GaussianTransition:
        prediction = velocity(batch.latents, batch.sigma, batch.families.prompt.to(batch.latents.device))
        active = torch.ones(len(batch.families), dtype=torch.bool)
        return self.sampler.transition(batch.latents, prediction, batch.families.depth, active)

    def _losses(
        self, batch: FamilyBatch, policies: Policies, old: Tensor | None, record: UpdateRecord, first: bool
    ) -> Tensor:
        """The loss of each edge, (E,)."""
        transition = self._transition(policies.trained, batch)
        log_prob = transition.rows(batch.family).log_prob(batch.following, self.sampler.reduction)
        if first:
            # The weights are still those of the rollout, so the behaviour policy's density is this very number.
            old = log_prob.detach()
            record.mismatch.append((old - batch.log_prob).abs().cpu())
        ratio = probability_ratio(log_prob, batch.log_prob if old is None else old)
        losses = clipped_loss(ratio, batch.advantage, self.loss.clip_range)
        if self.loss.weighting == "noise":
            losses = losses * self._noise_weights[batch.families.depth][batch.families.family].to(losses.device)
        record.rows += len(batch.families)
        record.loss.append(losses.detach().cpu())
        record.depth.append(batch.families.edge_depth)
        deviation = (ratio.detach() - 1).abs().cpu()
        record.deviation.append(deviation)
        if first:
            record.first_deviation.append(deviation)
        record.clipped.append(clipped_away(ratio.detach(), batch.advantage, self.loss.clip_range).cpu())
        if policies.reference is not None:
            divergence = self._divergence(policies.reference, batch, transition)
            record.reference_rows += len(batch.families)
            record.kl.append(divergence.detach().cpu())
            losses = losses + self.loss.kl * divergence
        return losses

    def _divergence(self, reference: VelocityFunction, batch: FamilyBatch, transition: GaussianTransition) -> Tensor:
        """KL of each edge's transition to the start policy's, (E,)."""
        with torch.no_grad():
            start = self._transition(reference, batch)
        return transition.kl(start, self.sampler.reduction)[batch.family]

    @torch.no_grad()
    def _rescored(
        self, tree: BranchTree, part: Families, policies: Policies, record: UpdateRecord, joins: int
    ) -> Tensor | None:
        """Old densities (E,) from forwards of the batches that will be trained, under ``old_log_prob: recomputed``."""
        if self.loss.old_log_prob != "recomputed":
            return None

        def score(rows: slice) -> Tensor:
            batch = gather(tree, part.select(torch.arange(rows.start, rows.stop)), self.accelerator.device)
            transition = self._transition(policies.trained, batch).rows(batch.family)
            return transition.log_prob(batch.following, self.sampler.reduction)

        record.rescored_rows += len(part)
        densities = [density for _, density in self.limit.each(len(part), score)]
        for _ in range(joins):
            self._loss_without_edges(tree, Policies(policies.trained, None))
        return torch.cat(densities) if densities else None


def partition(
    families: Families, steps: int, seed: int, iteration: int, prompt_ids: Sequence[int], first: int
) -> list[Families]:
    """Deal an iteration's families out to its optimiser steps.

    Each prompt's families are shuffled by an addressed permutation and dealt round-robin, starting at the prompt's
    place in the whole batch, ``first`` being that of this process's first prompt: so the parts do not depend on the
    number of processes.
    """
    if steps == 1:
        return [families]
    part = torch.zeros(len(families), dtype=torch.int64)
    for place, prompt_id in enumerate(prompt_ids):
        mine = torch.nonzero(families.prompt == place)[:, 0]
        source = generator(seed, iteration, prompt_id, 0, 0, Purpose.PERMUTATION)
        order = torch.randperm(len(mine), generator=source)
        part[mine[order]] = (torch.arange(len(mine)) + first + place) % steps
    return [families.select(torch.nonzero(part == step)[:, 0]) for step in range(steps)]
