"""The gradient of one optimiser step, from the families that its edges are in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from branchtree.core.families import Families, FamilyBatch, gather
from branchtree.core.loss import clipped_away, clipped_loss, probability_ratio
from branchtree.core.rollout import Sampler, VelocityFunction, chunks
from branchtree.core.transfer import send
from branchtree.core.transitions import GaussianTransition
from branchtree.core.tree import BranchTree
from branchtree.recipe.schema import LossSection
from branchtree.training.engine import Engine
from branchtree.training.microbatch import RowLimit, ran_out_of_memory

_ON_HOST = ("grad_norms", "depth")
"""Lists of an UpdateRecord that are never on the device."""


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

    def on_host(self) -> UpdateRecord:
        """The same, off the device: in one copy, for each makes the host wait until the device has done all before."""
        names = [name for name, kept in vars(self).items() if isinstance(kept, list) and name not in _ON_HOST]
        tensors = [tensor for name in names for tensor in getattr(self, name)]
        if not tensors or tensors[0].device.type == "cpu":
            return self
        flat = [tensor.float() for tensor in tensors]
        copied = torch.cat(flat).cpu().split([len(tensor) for tensor in tensors])
        back = iter([copy.to(tensor.dtype) for copy, tensor in zip(copied, tensors, strict=True)])
        record = replace(self)
        for name in names:
            setattr(record, name, [next(back) for _ in getattr(self, name)])
        return record


@dataclass(frozen=True)
class Policies:
    """The velocity functions of one iteration's prompts."""

    trained: VelocityFunction
    reference: VelocityFunction | None  # the frozen start policy, where there is a KL term


@dataclass(frozen=True)
class Objective:
    """The loss of edges."""

    sampler: Sampler
    loss: LossSection
    device: torch.device

    @cached_property
    def _noise_weights(self) -> Tensor:
        """Weights of the steps, (T,)."""
        return self.sampler.noise_weights()

    def _transition(self, velocity: VelocityFunction, batch: FamilyBatch) -> GaussianTransition:
        prediction = velocity(batch.latents, batch.sigma, send(batch.families.prompt, batch.latents.device))
        active = torch.ones(len(batch.families), dtype=torch.bool)
        return self.sampler.transition(batch.latents, prediction, batch.families.depth, active)

    def losses(
        self, batch: FamilyBatch, policies: Policies, old: Tensor | None, record: UpdateRecord, first: bool
    ) -> Tensor:
        """The loss of each edge, (E,)."""
        transition = self._transition(policies.trained, batch)
        log_prob = transition.rows(batch.family).log_prob(batch.following, self.sampler.reduction)
        if first:
            # The weights are still those of the rollout, so the behaviour policy's density is this very number.
            old = log_prob.detach()
            record.mismatch.append((old - batch.log_prob).abs())
        ratio = probability_ratio(log_prob, batch.log_prob if old is None else old)
        losses = clipped_loss(ratio, batch.advantage, self.loss.clip_range)
        if self.loss.weighting == "noise":
            weights = self._noise_weights[batch.families.depth][batch.families.family]
            losses = losses * send(weights, losses.device)
        record.rows += len(batch.families)
        record.loss.append(losses.detach())
        record.depth.append(batch.families.edge_depth)
        deviation = (ratio.detach() - 1).abs()
        record.deviation.append(deviation)
        if first:
            record.first_deviation.append(deviation)
        record.clipped.append(clipped_away(ratio.detach(), batch.advantage, self.loss.clip_range))
        if policies.reference is not None:
            divergence = self._divergence(policies.reference, batch, transition)
            record.reference_rows += len(batch.families)
            record.kl.append(divergence.detach())
            losses = losses + self.loss.kl * divergence
        return losses

    def _divergence(self, reference: VelocityFunction, batch: FamilyBatch, transition: GaussianTransition) -> Tensor:
        """KL of each edge's transition to the start policy's, (E,)."""
        with torch.no_grad():
            start = self._transition(reference, batch)
        return transition.kl(start, self.sampler.reduction)[batch.family]

    @torch.no_grad()
    def log_prob(self, tree: BranchTree, families: Families, policies: Policies) -> Tensor:
        """Densities (E,) under the trained policy as it is."""
        batch = gather(tree, families, self.device)
        transition = self._transition(policies.trained, batch).rows(batch.family)
        return transition.log_prob(batch.following, self.sampler.reduction)

    def without_edges(self, tree: BranchTree, policies: Policies) -> Tensor:
        """A loss whose gradient is zero, from the same forwards as a batch's."""
        latents = tree.states[0][:1].to(self.device)
        sigma, root = tree.sigmas[:1].to(latents.device), torch.zeros(1, dtype=torch.int64, device=latents.device)
        prediction = policies.trained(latents, sigma, root)
        if policies.reference is not None:
            with torch.no_grad():
                policies.reference(latents, sigma, root)
        return prediction.sum() * 0


class Gradient:
    """The gradient of the sum of the edges' losses, which grows as families are added.

    Where processes reduce gradients, they do so in the last backward: so the last batch waits until ``finish``. Where
    memory runs out, what has been accumulated may end in the middle of a batch: all begins again, in smaller batches.
    """

    def __init__(
        self,
        objective: Objective,
        engine: Engine,
        limit: RowLimit,
        processes: int,
        tree: BranchTree,
        policies: Policies,
        old: Tensor | None = None,
        first: bool = True,
    ) -> None:
        """``old`` are densities (E,) before the iteration's first step, where they were computed again; ``first`` says
        that no step of the iteration has been taken: the weights are those of the rollout.
        """
        self._objective, self._engine, self._limit, self._processes = objective, engine, limit, processes
        self._tree, self._policies, self._old, self._first = tree, policies, old, first
        self._given: list[Families] = []
        self._waiting: list[Families] = []
        self._differentiated = 0  # edges
        self.seen = UpdateRecord()

    def add(self, families: Families) -> None:
        """Differentiate the loss of some families' edges. Raises DeviceMemoryError where one does not fit."""
        self._given.append(families)
        self._accumulate(self._batches([families]), ending=False, joins=0)

    @property
    def edges(self) -> int:
        """Of all families so far."""
        return sum(families.edges for families in self._given)

    def finish(self, joins: int) -> UpdateRecord:
        """Differentiate what waits, and make ``joins`` more backwards without an edge, which only other processes need.

        Returns what was seen.
        """
        if self._processes > 1 and not self._waiting:
            joins = max(joins, 1)  # gradients are reduced in a backward, so even a process without an edge needs one
        self._accumulate([], ending=True, joins=joins)
        return self.seen.on_host()

    def _batches(self, given: Sequence[Families]) -> list[Families]:
        return [
            families.select(torch.arange(span.start, span.stop))
            for families in given
            for span in chunks(len(families), self._limit.rows)
        ]

    def _accumulate(self, batches: Sequence[Families], ending: bool, joins: int) -> None:
        while True:
            work = [*self._waiting, *batches]
            waits = 1 if self._processes > 1 and not ending else 0
            ready, self._waiting = work[: len(work) - waits], work[len(work) - waits :]
            failure = self._differentiate([*ready, *[None] * joins], ending)
            if failure is None:
                return
            self._engine.discard()
            self._limit.shrink(*failure)
            self._waiting, self._differentiated, self.seen = [], 0, UpdateRecord()
            batches = self._batches(self._given)

    def _differentiate(self, batches: Sequence[Families | None], ending: bool) -> tuple[int, str] | None:
        """Add the gradient of each batch; where one does not fit in memory, returns its rows and the reason."""
        for index, families in enumerate(batches):
            last = ending and index == len(batches) - 1
            try:
                with self._engine.accumulating(last):
                    self._engine.backward(self._loss(families))
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                rows = len(families) if families else 1
                if last and self._processes > 1:
                    self._limit.refuse(rows, str(error))  # the others wait in the middle of a reduction
                return rows, str(error)
        return None

    def _loss(self, families: Families | None) -> Tensor:
        """The sum of a batch's losses."""
        if families is None:
            reference = self._policies.reference if self._engine.joint else None
            return self._objective.without_edges(self._tree, Policies(self._policies.trained, reference))
        batch = gather(self._tree, families, self._objective.device)
        old = None if self._old is None else self._old[self._differentiated : self._differentiated + families.edges]
        losses = self._objective.losses(batch, self._policies, old, self.seen, self._first)
        self._differentiated += families.edges
        return losses.sum()
