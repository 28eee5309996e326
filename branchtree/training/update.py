"""The gradient pass: clipped policy-gradient steps over the families of a scored tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.core.families import Families
from branchtree.core.noise import Purpose, generator
from branchtree.core.rollout import chunks
from branchtree.core.tree import BranchTree
from branchtree.errors import DeviceMemoryError
from branchtree.training.ema import WeightAverage
from branchtree.training.engine import Engine
from branchtree.training.gradient import Gradient, Objective, Policies, UpdateRecord
from branchtree.training.guard import UpdateGuard
from branchtree.training.lockstep import Lockstep
from branchtree.training.microbatch import RowLimit, first_line, ran_out_of_memory


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
        """The gradient of a step, to which families can be added; see ``Gradient``."""
        processes = self.accelerator.num_processes
        return Gradient(self.objective, self.engine, self.limit, processes, tree, policies, old, first)

    def run(
        self,
        tree: BranchTree,
        parts: Sequence[Families],
        policies: Policies,
        iteration: int,
        begun: Gradient | None = None,
    ) -> UpdateRecord:
        """One optimiser step per part; ``begun`` is the first one's gradient where it has been begun with others.

        Raises BranchTreeError if too many in a row would do harm.
        """
        record = UpdateRecord()
        work = self._shared_work(parts, begun)
        # Families of later steps are scored against the weights of the rollout before the first step changes them.
        old = [
            self._rescored(tree, part, policies, record, joins) if index else None
            for index, (part, (_, joins)) in enumerate(zip(parts, work, strict=True))
        ]
        for part, (edges, joins), old_log_prob in zip(parts, work, old, strict=True):
            if edges == 0:
                record.skipped_steps += 1
            else:
                gradient = begun or self.begin(tree, policies, old_log_prob, first=record.steps == 0)
                gradient.add(part)
                record.add(gradient.finish(joins))
                # The loss is the mean over the edges of all processes, and the engine averages over processes.
                self.engine.scale(self.accelerator.num_processes / edges)
                self._take(record, iteration)
                begun = None
            self.scheduler.step()  # taken or not
        return record

    def _shared_work(self, parts: Sequence[Families], begun: Gradient | None) -> list[tuple[int, int]]:
        """Of each part, the edges of all processes, and how many forwards other processes make more than this one."""
        counts = [(part.edges, len(chunks(len(part), self.limit.rows))) for part in parts]
        if begun is not None:
            counts[0] = (counts[0][0] + begun.edges, counts[0][1])
        mine = [count for pair in counts for count in pair]
        everyone = Lockstep(self.accelerator, self.engine.joint).counts(mine).reshape(-1, len(parts), 2)
        edges = everyone[:, :, 0].sum(0).tolist()
        batches = everyone[:, :, 1].amax(0).tolist() if self.engine.joint else mine[1::2]
        return [(total, most - own) for total, most, own in zip(edges, batches, mine[1::2], strict=True)]

    def _rescored(
        self, tree: BranchTree, part: Families, policies: Policies, record: UpdateRecord, joins: int
    ) -> Tensor | None:
        """Old densities (E,) from forwards of the batches that will be trained, under ``old_log_prob: recomputed``."""
        if self.objective.loss.old_log_prob != "recomputed":
            return None

        def score(rows: slice) -> Tensor:
            families = part.select(torch.arange(rows.start, rows.stop))
            return self.objective.log_prob(tree, families, policies)

        record.rescored_rows += len(part)
        densities = [density for _, density in self.limit.each(len(part), score)]
        with torch.no_grad():
            for _ in range(joins):
                self.objective.without_edges(tree, Policies(policies.trained, None))
        return torch.cat(densities) if densities else None

    def _take(self, record: UpdateRecord, iteration: int) -> None:
        """Clip the gradient and take the optimiser's step, unless it would do harm."""
        norm = self.engine.clip(self.max_grad_norm)
        if not self.guard.admits(norm, iteration):
            self.engine.discard()
            record.refused_steps += 1
            return
        self._step()
        if self.average is not None:
            self.average.update()
        record.steps += 1
        record.grad_norms.append(norm)

    def _step(self) -> None:
        """The optimiser's step, which makes its moments when it is the first. Raises DeviceMemoryError."""
        try:
            self.engine.step()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                "memory ran out in the optimiser's step, which needs the gradients and two moments beside the weights. "
                f"What would fit: {self.remedy()}. {first_line(str(error))}"
            ) from error


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
