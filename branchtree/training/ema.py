"""An exponential moving average of the trained weights, kept on the CPU.

Where weights are sharded, each process keeps the average of its own part: 4 bytes a weight over all processes, and
nothing is sent but when it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from branchtree.training.sharding import joined, local, share_of


class WeightAverage:
    """average = d * average + (1 - d) * weight, after each optimiser step, in float32.

    After ``n`` earlier steps d is min(decay, (1 + n) / (10 + n)), and 0 at the first, as in diffusers' ``EMAModel``:
    the average follows the weights from the start, however short the run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self.steps = 0  # that the average has taken in
        self._parameters = dict(parameters)
        self._average = {name: local(value).float().cpu().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        self.steps += 1
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(local(parameter).float().cpu(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The whole averages by parameter name, float32. Where weights are sharded, all processes must call this."""
        return {name: joined(value, self._parameters[name]) for name, value in self._average.items()}

    def weights(self) -> dict[str, Tensor]:
        """The averages in the parameters' own dtypes, ready to be written in their place."""
        return {name: value.to(self._parameters[name].dtype) for name, value in self.state().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model holds the averages, as ``final/`` will."""
        originals = {name: local(parameter).cpu().clone() for name, parameter in self._parameters.items()}
        try:
            self._assign(self._average)
            yield
        finally:
            self._assign(originals)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(values[name])

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved state, of any number of processes, that took in so many steps."""
        self.steps = steps
        for name, average in self._average.items():
            average.copy_(local(share_of(state[name], self._parameters[name])))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the weights as they are now."""
        self.steps = 0
        for name, parameter in self._parameters.items():
            self._average[name].copy_(local(parameter))
