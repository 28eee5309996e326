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

from branchtree.errors import RewardError
from branchtree.protocols import VelocityFunction

Result = TypeVar("Result")


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

    def together(self, work: Callable[[], Result]) -> Result:
        """Do ``work``; a RewardError of one process is raised on all, so that none waits for one that has ended."""
        from accelerate.utils import gather_object

        result: list[Result] = []
        failure: RewardError | None = None
        try:
            result.append(work())
        except RewardError as error:
            failure = error
        told: list[str | None] = gather_object([None if failure is None else str(failure)])
        if failure is not None:
            raise failure
        for message in told:
            if message is not None:
                raise RewardError(message)
        return result[0]
