"""The gradient pass: the optimiser steps on the loss of scored trees.

A step first plans its batches of rows, together with the other processes, and then differentiates them one after the
other. Updates that would do harm are left out, alike on all processes, and counted; too many in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.core.noise import Purpose, generator
from branchtree.core.rollout import chunks
from branchtree.core.tree import BranchTree
from branchtree.errors import BranchTreeError, DeviceMemoryError
from branchtree.recipe.schema import OptimSection
from branchtree.training.engine import Engine, WeightAverage
from branchtree.training.limits import RowLimit, first_line, ran_out_of_memory
from branchtree.training.objective import AnyWork, Earlier, Objective, OptimiserStep, Policies, UpdateRecord, Work
from branchtree.training.processes import Processes


class Gradient:
    """The gradient of the sum of all terms of the loss, which grows as work is added.

    Where processes reduce gradients, they do so in the last backward: so the last batch waits until ``finish``. Where
    memory runs out, what has been accumulated may end in the middle of a batch: all begins again, in smaller batches.
    """

    def __init__(
        self,
        objective: Objective[Any],
        engine: Engine,
        limit: RowLimit,
        processes: int,
        step: OptimiserStep,
        earlier: Earlier | None = None,
    ) -> None:
        """``earlier`` was predicted before the iteration's first step, where that is needed."""
        self._objective, self._engine, self._limit, self._processes = objective, engine, limit, processes
        self._step, self._earlier = step, earlier
        self._given: list[Work] = []
        self._waiting: list[Work] = []
        self._rows, self._terms = 0, 0  # differentiated
        self._prepared = UpdateRecord()
        self.seen = UpdateRecord()

    def add(self, work: Work) -> None:
        """Differentiate more terms of the loss. Raises DeviceMemoryError where a row does not fit."""
        work = self._objective.prepare(self._step, work, self._earlier, self._prepared, self._limit)
        self._given.append(work)
        self._accumulate(self._batches([work]), ending=False, extra=0)

    @property
    def edges(self) -> int:
        """Terms of the loss so far."""
        return sum(work.edges for work in self._given)

    def finish(self, extra: int) -> UpdateRecord:
        """Differentiate what waits, and make ``extra`` more backwards without a term, which only other processes need.

        Returns what was seen.
        """
        if self._processes > 1 and not self._waiting:
            extra = max(extra, 1)  # gradients are reduced in a backward, so even a process without a term needs one
        self._accumulate([], ending=True, extra=extra)
        self.seen.add(self._prepared)
        return self.seen.on_host()

    def _batches(self, given: Sequence[Work]) -> list[Work]:
        return [
            work.select(torch.arange(span.start, span.stop))
            for work in given
            for span in chunks(len(work), self._limit.rows)
        ]

    def _accumulate(self, batches: Sequence[Work], ending: bool, extra: int) -> None:
        while True:
            work = [*self._waiting, *batches]
            waits = 1 if self._processes > 1 and not ending else 0
            ready, self._waiting = work[: len(work) - waits], work[len(work) - waits :]
            failure = self._differentiate([*ready, *[None] * extra], ending)
            if failure is None:
                return
            self._engine.discard()
            self._limit.shrink(*failure)
            self._waiting, self._rows, self._terms, self.seen = [], 0, 0, UpdateRecord()
            batches = self._batches(self._given)

    def _differentiate(self, batches: Sequence[Work | None], ending: bool) -> tuple[int, str] | None:
        """Add the gradient of each batch; where one does not fit in memory, returns its rows and the reason."""
        for index, work in enumerate(batches):
            last = ending and index == len(batches) - 1
            try:
                with self._engine.accumulating(last):
                    self._engine.backward(self._loss(work))
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                rows = len(work) if work else 1
                if last and self._processes > 1:
                    self._limit.refuse(rows, str(error))  # the others wait in the middle of a reduction
                return rows, str(error)
        return None

    def _loss(self, work: Work | None) -> Tensor:
        """Return the sum of a batch's losses; without work, 0 from a forward that other processes need."""
        if work is None:
            policies = self._step.policies
            reference = policies.reference if self._engine.joint else None
            return self._objective.without_terms(self._step.tree, Policies(policies.trained, reference))
        rows, terms = slice(self._rows, self._rows + len(work)), slice(self._terms, self._terms + work.edges)
        earlier = None if self._earlier is None else self._earlier.of(rows, terms)
        losses = self._objective.losses(self._step, work, earlier, self.seen)
        self._rows, self._terms = rows.stop, terms.stop
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
    objective: Objective[Any]
    max_grad_norm: float
    limit: RowLimit  # of rows per forward
    guard: UpdateGuard
    average: WeightAverage | None
    remedy: Callable[[], str] = _general_remedy  # what to change where memory runs out in an optimiser's step

    @property
    def optimizer(self) -> Any:
        """The engine's optimiser."""
        return self.engine.optimizer

    def begin(
        self, tree: BranchTree, policies: Policies, earlier: Earlier | None = None, first: bool = True
    ) -> Gradient:
        """Return the gradient of a step, to which work can be added; see ``Gradient``."""
        step = OptimiserStep(tree, policies, first)
        return Gradient(self.objective, self.engine, self.limit, self.accelerator.num_processes, step, earlier)

    def run(
        self,
        tree: BranchTree,
        steps: Sequence[Work],
        policies: Policies,
        iteration: int,
        begun: Gradient | None = None,
    ) -> UpdateRecord:
        """Take an optimiser step on each of ``steps``; ``begun`` is the first one's gradient of work before these.

        Raises BranchTreeError if too many in a row would do harm.
        """
        record = UpdateRecord()
        counts = self._counts(steps, begun)
        # Work of later steps is compared with the weights of the rollout, before the first step changes them.
        earlier = [
            self._earlier(tree, work, policies, record, extra) if i else None
            for i, (work, (_, extra)) in enumerate(zip(steps, counts, strict=True))
        ]
        for work, (terms, extra), before in zip(steps, counts, earlier, strict=True):
            if terms == 0:
                record.skipped_steps += 1
            else:
                gradient = begun or self.begin(tree, policies, before, first=record.steps == 0)
                gradient.add(work)
                record.add(gradient.finish(extra))
                # The loss is the mean over the terms of all processes, and the engine averages over processes.
                self.engine.scale(self.accelerator.num_processes / terms)
                self._take(record, iteration)
                begun = None
            self.scheduler.step()  # taken or not
        return record

    def _counts(self, steps: Sequence[Work], begun: Gradient | None) -> list[tuple[int, int]]:
        """Return, for each step, the terms of all processes, and how many more forwards another process makes."""
        counts = [(work.edges, len(chunks(len(work), self.limit.rows))) for work in steps]
        if begun is not None:
            counts[0] = (counts[0][0] + begun.edges, counts[0][1])
        mine = [count for pair in counts for count in pair]
        everyone = Processes(self.accelerator, self.engine.joint).counts(mine).reshape(-1, len(steps), 2)
        terms = everyone[:, :, 0].sum(0).tolist()
        batches = everyone[:, :, 1].amax(0).tolist() if self.engine.joint else mine[1::2]
        return [(total, most - own) for total, most, own in zip(terms, batches, mine[1::2], strict=True)]

    def _earlier(
        self, tree: BranchTree, work: Work, policies: Policies, record: UpdateRecord, extra: int
    ) -> Earlier | None:
        """Return what the objective compares with, from forwards of the batches to be trained; None if with nothing."""
        if not self.objective.looks_back:
            return None

        @torch.no_grad()
        def predict(rows: slice) -> Earlier:
            return self.objective.earlier(tree, work.select(torch.arange(rows.start, rows.stop)), policies)

        record.rescored_rows += len(work)
        found = [earlier for _, earlier in self.limit.each(len(work), predict)]
        with torch.no_grad():
            for _ in range(extra):
                self.objective.without_terms(tree, Policies(policies.trained, None))
        return Earlier.concatenate(found) if found else None

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
    work: AnyWork, steps: int, seed: int, iteration: int, prompt_ids: Sequence[int], first: int
) -> list[AnyWork]:
    """Deal an iteration's rows out to its optimiser steps.

    Each prompt's rows are shuffled by an addressed permutation and dealt round-robin, starting at the prompt's
    index in the whole batch, ``first`` being that of this process's first prompt: so a step's rows do not depend on
    the number of processes.
    """
    if steps == 1:
        return [work]
    step = torch.zeros(len(work), dtype=torch.int64)
    for i, prompt_id in enumerate(prompt_ids):
        mine = torch.nonzero(work.prompt == i)[:, 0]
        source = generator(seed, iteration, prompt_id, 0, 0, Purpose.PERMUTATION)
        order = torch.randperm(len(mine), generator=source)
        step[mine[order]] = (torch.arange(len(mine)) + first + i) % steps
    return [work.select(torch.nonzero(step == each)[:, 0]) for each in range(steps)]
