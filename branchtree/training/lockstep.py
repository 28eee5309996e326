"""Keeps processes in step where a forward is a collective call.

With sharded weights every forward gathers them from all processes and every backward hands gradients out again, so a
process that makes one call fewer than the others leaves them waiting. Before a phase the processes exchange how many
forwards each will make; one that makes fewer joins at the end with a row whose result is thrown away. A phase is
finished before anything else is exchanged. With whole weights nothing is exchanged and nobody joins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from branchtree.core.rollout import VelocityFunction
from branchtree.errors import BranchTreeError, DataError, RewardError

Result = TypeVar("Result")
Value = TypeVar("Value")


def process_group(minutes: float) -> Any:
    """accelerate's settings of the process group: how long a process waits for the others in a collective call."""
    from accelerate.utils import InitProcessGroupKwargs

    # The microsecond, since accelerate leaves out a timeout that is its own default, and gloo's default is another.
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes, microseconds=1))


class Phase:
    """Forwards of one phase, in which every process makes ``calls``."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    @property
    def done(self) -> bool:
        """Whether every call has been made."""
        return self._left <= 0

    def counted(self, velocity: VelocityFunction) -> VelocityFunction:
        """The same function, whose calls count as this phase's."""

        def call(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            self._left -= 1
            return velocity(latents, sigma, prompt)

        return call

    @torch.no_grad()
    def join(self, velocity: VelocityFunction, row: Tensor) -> None:
        """Make the calls that other processes make and this one did not, with one row of latents (1, *latent)."""
        sigma, prompt = torch.ones(1, device=row.device), torch.zeros(1, dtype=torch.int64, device=row.device)
        while not self.done:
            self._left -= 1
            velocity(row, sigma, prompt)


@dataclass(frozen=True)
class Lockstep:
    """The processes of a run. ``joint``: a forward or backward of one is a call that all must make."""

    accelerator: Any
    joint: bool

    def phase(self, calls: int) -> Phase:
        """A phase in which this process would make ``calls`` forwards by itself."""
        return Phase(max(self.counts([calls])[:, 0].tolist()) if self.joint else 0)

    def counts(self, mine: Sequence[int]) -> Tensor:
        """What every process counts, (processes, len(mine)) int64, on the CPU."""
        row = torch.tensor([list(mine)], dtype=torch.int64, device=self.accelerator.device)
        everyone: Tensor = self.accelerator.gather(row)
        return everyone.cpu()

    def everyone(self, mine: Value) -> list[Value]:
        """What every process has, in order. All must call this."""
        from accelerate.utils import gather_object

        gathered: list[Value] = gather_object([mine])
        return gathered

    def together(self, work: Callable[[], Result]) -> Result:
        """Do ``work``; what one process raises is raised on all, so that none waits for one that has ended.

        ``work`` exchanges nothing between processes but the forwards of sharded weights. Where it makes some, only a
        RewardError or DataError is raised on all: after it the forwards that are left must have been made.
        """
        result: list[Result] = []
        failure: Exception | None = None
        try:
            result.append(work())
        except Exception as error:
            if self.joint and not isinstance(error, RewardError | DataError):
                raise
            failure = error
        found = self.everyone(None if failure is None else _described(failure))
        if failure is not None:
            raise failure
        for kind, message in (each for each in found if each is not None):
            raise kind(message)
        return result[0]


def _described(error: Exception) -> tuple[type[BranchTreeError], str]:
    """What other processes raise."""
    if isinstance(error, BranchTreeError):
        return type(error), str(error)
    return BranchTreeError, f"another process failed: {type(error).__name__}: {error}"
