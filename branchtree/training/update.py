"""The gradient pass: clipped policy-gradient steps over the families of a scored tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from branchtree.training.guard import UpdateGuard
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
class Updater:
    """Takes the optimiser steps of an iteration. ``accelerator`` is accelerate's, ``module`` the prepared denoiser."""

    accelerator: Any
    module: torch.nn.Module
    optimizer: Any
    scheduler: Any
    sampler: Sampler
    loss: LossSection
    max_grad_norm: float
    limit: RowLimit  # of families per forward
    parameters: Sequence[torch.nn.Parameter]
    guard: UpdateGuard
    average: WeightAverage | None

    def run(self, tree: BranchTree, parts: Sequence[Families], policies: Policies, iteration: int) -> UpdateRecord:
        """One optimiser step per part. Raises BranchTreeError if too many in a row would do harm."""
        record = UpdateRecord()
        # Families of later steps are scored against the weights of the rollout before the first step changes them.
        old = [self._rescored(tree, part, policies, record) if index else None for index, part in enumerate(parts)]
        for part, old_log_prob in zip(parts, old, strict=True):
            self._step(tree, part, policies, old_log_prob, record, iteration)
        return record

    def _step(
        self,
        tree: BranchTree,
        part: Families,
        policies: Policies,
        old: Tensor | None,
        record: UpdateRecord,
        iteration: int,
    ) -> None:
        edges = int(self.accelerator.reduce(torch.tensor(part.edges, device=self.accelerator.device), "sum"))
        if edges == 0:
            record.skipped_steps += 1
            return
        if len(part) > 0:
            record.add(self._gradient(tree, part, policies, old, record.steps == 0, edges))
        else:
            self._join_without_edges(tree, policies)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not self.guard.admits(norm, iteration):
            self.optimizer.zero_grad()
            record.refused_steps += 1
            return
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        record.steps += 1
        record.grad_norms.append(norm)

    def _gradient(
        self,
        tree: BranchTree,
        part: Families,
        policies: Policies,
        old: Tensor | None,
        first: bool,
        edges: int,
    ) -> UpdateRecord:
        """Accumulate a step's gradient, and tell what was seen.

        Where memory runs out, what has been accumulated may end in the middle of a batch: the step begins again, in
        smaller batches. Raises DeviceMemoryError where it cannot.
        """
        while True:
            batches, seen, failed, done = list(self._batches(part)), UpdateRecord(), 0, 0
            for index, families in enumerate(batches):
                last = index == len(batches) - 1
                known = None if old is None else old[done : done + families.edges]
                done += families.edges
                reason = self._accumulate(tree, families, policies, known, first, edges, last, seen)
                if reason is not None:
                    failed = len(families)
                    break
            else:
                return seen
            self.optimizer.zero_grad()
            self.limit.shrink(failed, reason)

    def _accumulate(
        self,
        tree: BranchTree,
        families: Families,
        policies: Policies,
        old: Tensor | None,
        first: bool,
        edges: int,
        last: bool,
        seen: UpdateRecord,
    ) -> str | None:
        """Add the gradient of one batch; returns the reason if memory ran out and the step may begin again."""
        try:
            batch = gather(tree, families, self.accelerator.device)
            with self._sync_only(last):
                losses = self._losses(batch, policies, old, seen, first)
                # DDP averages over processes; the loss is the mean over the edges of all of them.
                self.accelerator.backward(losses.sum() * self.accelerator.num_processes / edges)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if last and self.accelerator.num_processes > 1:
                self.limit.refuse(len(families), str(error))  # the others wait in the middle of a reduction
            return str(error)
        return None

    @cached_property
    def _noise_weights(self) -> Tensor:
        """Weights of the steps, (T,)."""
        return self.sampler.noise_weights()

    def _batches(self, families: Families) -> Iterator[Families]:
        if len(families) == 0:
            return
        for span in chunks(len(families), self.limit.rows):
            yield families.select(torch.arange(span.start, span.stop))

    def _sync_only(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced once per step: every process makes the same collective calls whatever it trains."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def _join_without_edges(self, tree: BranchTree, policies: Policies) -> None:
        """Take part in the reduction with a gradient of zero."""
        root = torch.zeros(1, dtype=torch.int64)
        latents = tree.states[0][:1].to(self.accelerator.device)
        prediction = policies.trained(latents, tree.sigmas[:1].to(latents.device), root.to(latents.device))
        self.accelerator.backward(prediction.sum() * 0)

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
    def _rescored(self, tree: BranchTree, part: Families, policies: Policies, record: UpdateRecord) -> Tensor | None:
        """Old densities (E,) from forwards of the batches that will be trained, under ``old_log_prob: recomputed``."""
        if self.loss.old_log_prob != "recomputed" or len(part) == 0:
            return None

        def score(rows: slice) -> Tensor:
            batch = gather(tree, part.select(torch.arange(rows.start, rows.stop)), self.accelerator.device)
            transition = self._transition(policies.trained, batch).rows(batch.family)
            return transition.log_prob(batch.following, self.sampler.reduction)

        record.rescored_rows += len(part)
        return torch.cat([density for _, density in self.limit.each(len(part), score)])


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
