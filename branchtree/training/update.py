"""The gradient pass: clipped policy-gradient steps over the families of a scored tree.

A step first plans its batches of families, together with the other processes, and then differentiates them one after
the other. Updates that would do harm are left out, alike on all processes, and counted; too many in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from branchtree.core.families import Families, FamilyBatch, gather
from branchtree.core.loss import EdgeLoss, clipped_away, probability_ratio
from branchtree.core.noise import Purpose, generator
from branchtree.core.rollout import Sampler, VelocityFunction, chunks
from branchtree.core.transfer import send
from branchtree.core.transitions import Transition
from branchtree.core.tree import BranchTree
from branchtree.errors import BranchTreeError, DeviceMemoryError
from branchtree.recipe.schema import LossSection, OptimSection
from branchtree.training.engine import Engine, WeightAverage
from branchtree.training.limits import RowLimit, first_line, ran_out_of_memory
from branchtree.training.processes import Processes

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
        """Append what was seen after this."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def on_host(self) -> UpdateRecord:
        """Return the record off the device, in one copy: each makes the host wait until the device is done."""
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
    """The policies under one iteration's prompts."""

    trained: VelocityFunction
    reference: VelocityFunction | None  # the frozen start policy, where there is a KL term


@dataclass(frozen=True)
class Objective:
    """What the gradient pass minimises."""

    sampler: Sampler
    loss: LossSection
    device: torch.device
    edge_loss: EdgeLoss

    @cached_property
    def _noise_weights(self) -> Tensor:
        """Each step's weight, (T,)."""
        return self.sampler.noise_weights()

    def _transition(self, velocity: VelocityFunction, batch: FamilyBatch) -> Transition:
        prediction = velocity(batch.latents, batch.sigma, send(batch.families.prompt, batch.latents.device))
        active = torch.ones(len(batch.families), dtype=torch.bool)
        return self.sampler.transition(batch.latents, prediction, batch.families.depth, active)

    def losses(
        self, batch: FamilyBatch, policies: Policies, old: Tensor | None, record: UpdateRecord, first: bool
    ) -> Tensor:
        """Return the loss of each edge, (E,), and write what is seen into ``record``."""
        transition = self._transition(policies.trained, batch)
        log_prob = transition.rows(batch.family).log_prob(batch.following, self.sampler.reduction)
        if first:
            # The weights are still those of the rollout, so the behaviour policy's density is this very number.
            old = log_prob.detach()
            record.mismatch.append((old - batch.log_prob).abs())
        ratio = probability_ratio(log_prob, batch.log_prob if old is None else old)
        losses = self.edge_loss(ratio, batch.advantage)
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

    def _divergence(self, reference: VelocityFunction, batch: FamilyBatch, transition: Transition) -> Tensor:
        """Return the KL of each edge's transition to the start policy's, (E,)."""
        with torch.no_grad():
            start = self._transition(reference, batch)
        return transition.kl(start, self.sampler.reduction)[batch.family]

    @torch.no_grad()
    def log_prob(self, tree: BranchTree, families: Families, policies: Policies) -> Tensor:
        """Return log-densities (E,) under the trained policy as it is."""
        batch = gather(tree, families, self.device)
        transition = self._transition(policies.trained, batch).rows(batch.family)
        return transition.log_prob(batch.following, self.sampler.reduction)

    def without_edges(self, tree: BranchTree, policies: Policies) -> Tensor:
        """Return a loss whose gradient is zero, from the same forwards as a batch's."""
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
        self._accumulate(self._batches([families]), ending=False, extra=0)

    @property
    def edges(self) -> int:
        """Edges of all families so far."""
        return sum(families.edges for families in self._given)

    def finish(self, extra: int) -> UpdateRecord:
        """Differentiate what waits, and make ``extra`` more backwards without an edge, which only other processes need.

        Returns what was seen.
        """
        if self._processes > 1 and not self._waiting:
            extra = max(extra, 1)  # gradients are reduced in a backward, so even a process without an edge needs one
        self._accumulate([], ending=True, extra=extra)
        return self.seen.on_host()

    def _batches(self, given: Sequence[Families]) -> list[Families]:
        return [
            families.select(torch.arange(span.start, span.stop))
            for families in given
            for span in chunks(len(families), self._limit.rows)
        ]

    def _accumulate(self, batches: Sequence[Families], ending: bool, extra: int) -> None:
        while True:
            work = [*self._waiting, *batches]
            waits = 1 if self._processes > 1 and not ending else 0
            ready, self._waiting = work[: len(work) - waits], work[len(work) - waits :]
            failure = self._differentiate([*ready, *[None] * extra], ending)
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
        """Return the sum of a batch's losses; without families, 0 from a forward that other processes need."""
        if families is None:
            reference = self._policies.reference if self._engine.joint else None
            return self._objective.without_edges(self._tree, Policies(self._policies.trained, reference))
        batch = gather(self._tree, families, self._objective.device)
        old = None if self._old is None else self._old[self._differentiated : self._differentiated + families.edges]
        losses = self._objective.losses(batch, self._policies, old, self.seen, self._first)
        self._differentiated += families.edges
        return losses.sum()


class UpdateGuard:
    """Judges each update by its gradient's norm, which is the same on all processes.

    ``in_a_row`` counts the updates left out since the last one taken; checkpoints keep it.
    """

    def __init__(self, section: OptimSection) -> None:
        self._limit, self._most = section.refuse_above, section.max_refused
        self.in_a_row = 0
        self.admitted = 0  # updates since this process began: while it stays, so do the weights

    def admits(self, norm: float, iteration: int) -> bool:
        """Return whether to take an update whose gradient has this norm, before clipping.

        Raises BranchTreeError, the weights being as they were, when more than ``optim.max_refused`` in a row are not.
        """
        reason = self._reason(norm)
        if reason is None:
            self.in_a_row = 0
            self.admitted += 1
            return True
        self.in_a_row += 1
        if self.in_a_row > self._most:
            raise BranchTreeError(
                f"iteration {iteration}: {reason}; with it {self.in_a_row} updates in a row were left out, and "
                f"optim.max_refused allows {self._most}. Lower optim.lr or sampler.eta"
                + (", or look at the rewards of the last iterations" if math.isfinite(norm) else "")
            )
        return False

    def _reason(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self._limit is not None and norm > self._limit:
            return f"the gradient's norm {norm:.3g} is above optim.refuse_above {self._limit:.3g}"
        return None


def _general_remedy() -> str:
    return "train fewer weights (lora.rank), shard them (FSDP2), or take a larger device"


@dataclass(frozen=True)
class Updater:
    """Takes the optimiser steps of an iteration. ``accelerator`` is accelerate's."""

    accelerator: Any
    engine: Engine
    scheduler: Any
    objective: Objective
    max_grad_norm: float
    limit: RowLimit  # of families per forward
    guard: UpdateGuard
    average: WeightAverage | None
    remedy: Callable[[], str] = _general_remedy  # what to change where memory runs out in an optimiser's step

    @property
    def optimizer(self) -> Any:
        """The engine's optimiser."""
        return self.engine.optimizer

    def begin(self, tree: BranchTree, policies: Policies, old: Tensor | None = None, first: bool = True) -> Gradient:
        """Return the gradient of a step, to which families can be added; see ``Gradient``."""
        processes = self.accelerator.num_processes
        return Gradient(self.objective, self.engine, self.limit, processes, tree, policies, old, first)

    def run(
        self,
        tree: BranchTree,
        steps: Sequence[Families],
        policies: Policies,
        iteration: int,
        begun: Gradient | None = None,
    ) -> UpdateRecord:
        """Take an optimiser step on each of ``steps``; ``begun`` is the first one's gradient of families before these.

        Raises BranchTreeError if too many in a row would do harm.
        """
        record = UpdateRecord()
        work = self._shared_work(steps, begun)
        # Families of later steps are scored against the weights of the rollout before the first step changes them.
        old = [
            self._rescored(tree, families, policies, record, extra) if i else None
            for i, (families, (_, extra)) in enumerate(zip(steps, work, strict=True))
        ]
        for families, (edges, extra), old_log_prob in zip(steps, work, old, strict=True):
            if edges == 0:
                record.skipped_steps += 1
            else:
                gradient = begun or self.begin(tree, policies, old_log_prob, first=record.steps == 0)
                gradient.add(families)
                record.add(gradient.finish(extra))
                # The loss is the mean over the edges of all processes, and the engine averages over processes.
                self.engine.scale(self.accelerator.num_processes / edges)
                self._take(record, iteration)
                begun = None
            self.scheduler.step()  # taken or not
        return record

    def _shared_work(self, steps: Sequence[Families], begun: Gradient | None) -> list[tuple[int, int]]:
        """Return, for each step, the edges of all processes, and how many more forwards another process makes."""
        counts = [(families.edges, len(chunks(len(families), self.limit.rows))) for families in steps]
        if begun is not None:
            counts[0] = (counts[0][0] + begun.edges, counts[0][1])
        mine = [count for pair in counts for count in pair]
        everyone = Processes(self.accelerator, self.engine.joint).counts(mine).reshape(-1, len(steps), 2)
        edges = everyone[:, :, 0].sum(0).tolist()
        batches = everyone[:, :, 1].amax(0).tolist() if self.engine.joint else mine[1::2]
        return [(total, most - own) for total, most, own in zip(edges, batches, mine[1::2], strict=True)]

    def _rescored(
        self, tree: BranchTree, families: Families, policies: Policies, record: UpdateRecord, extra: int
    ) -> Tensor | None:
        """Return old densities (E,) from forwards of the batches to be trained, under ``old_log_prob: recomputed``."""
        if self.objective.loss.old_log_prob != "recomputed":
            return None

        def score(rows: slice) -> Tensor:
            batch = families.select(torch.arange(rows.start, rows.stop))
            return self.objective.log_prob(tree, batch, policies)

        record.rescored_rows += len(families)
        densities = [density for _, density in self.limit.each(len(families), score)]
        with torch.no_grad():
            for _ in range(extra):
                self.objective.without_edges(tree, Policies(policies.trained, None))
        return torch.cat(densities) if densities else None

    def _take(self, record: UpdateRecord, iteration: int) -> None:
        """Clip the gradient and take the optimiser's step, unless it would do harm. Raises DeviceMemoryError.

        The first step makes the optimiser's moments, for which there may be no memory.
        """
        norm = self.engine.clip(self.max_grad_norm)
        if not self.guard.admits(norm, iteration):
            self.engine.discard()
            record.refused_steps += 1
            return
        try:
            self.engine.step()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                "memory ran out in the optimiser's step, which needs the gradients and two moments beside the weights. "
                f"What would fit: {self.remedy()}. {first_line(str(error))}"
            ) from error
        if self.average is not None:
            self.average.update()
        record.steps += 1
        record.grad_norms.append(norm)


def partition(
    families: Families, steps: int, seed: int, iteration: int, prompt_ids: Sequence[int], first: int
) -> list[Families]:
    """Deal an iteration's families out to its optimiser steps.

    Each prompt's families are shuffled by an addressed permutation and dealt round-robin, starting at the prompt's
    index in the whole batch, ``first`` being that of this process's first prompt: so a step's families do not depend on
    the number of processes.
    """
    if steps == 1:
        return [families]
    step = torch.zeros(len(families), dtype=torch.int64)
    for i, prompt_id in enumerate(prompt_ids):
        mine = torch.nonzero(families.prompt == i)[:, 0]
        source = generator(seed, iteration, prompt_id, 0, 0, Purpose.PERMUTATION)
        order = torch.randperm(len(mine), generator=source)
        step[mine[order]] = (torch.arange(len(mine)) + first + i) % steps
    return [families.select(torch.nonzero(step == each)[:, 0]) for each in range(steps)]
