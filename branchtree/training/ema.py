"""An exponential moving average of the trained weights, kept on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weight, after each optimiser step, in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._parameters = dict(parameters)
        self._average = {name: value.detach().float().cpu().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.detach().float().cpu(), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32."""
        return dict(self._average)

    def weights(self) -> dict[str, Tensor]:
        """The averages in the parameters' own dtypes, ready to be written in their place."""
        return {name: value.to(self._parameters[name].dtype) for name, value in self._average.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        for name, average in self._average.items():
            average.copy_(state[name])
