"""Stand-ins for a pipeline's scheduler: one takes down what a single step is given, one stops once a grid is set.

Each is made of the real scheduler's own class, so that the pipeline finds the class and the settings it looks for.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StopCall(BaseException):
    """Leaves a pipeline's ``__call__`` early. No handler of the pipeline's may catch it."""


@dataclass
class StepRequest:
    """What one run of a pipeline is asked, and what it answered."""

    times: Tensor | None = None  # of the steps to take
    sigmas: Tensor | None = None  # one more
    outputs: list[Tensor] = field(default_factory=list)  # given to ``step``: predictions, after guidance
    samples: list[Tensor] = field(default_factory=list)  # given to ``step``: states
    grid: tuple[Tensor, Tensor] | None = None  # times and sigmas of the real scheduler


class StepAnswer(NamedTuple):
    """What a step gives: a tuple to most pipelines, its names to others."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class StepKeeper:
    """Takes the question's steps, and keeps what ``step`` is given."""

    question: StepRequest

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the question's grid, whatever is asked for: pipelines look whether these can be."""
        self.timesteps, self.sigmas = self.question.times, self.question.sigmas
        assert self.timesteps is not None
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: there is one step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample: states are those of the flow, or of the variance-preserving process."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> StepAnswer:
        """Keep the prediction and the state, and return the state."""
        self.question.outputs.append(model_output)
        self.question.samples.append(sample)
        return StepAnswer(sample, sample)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.copy(self)


class GridReader:
    """Sets the real scheduler's grid, keeps it, and leaves the call."""

    question: StepRequest

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.copy(self)

    def __init_subclass__(cls) -> None:
        own = cls.__mro__[2].set_timesteps  # type: ignore[attr-defined]

        @functools.wraps(own)  # pipelines look at its signature
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            own(self, *args, **kwargs)
            sigmas = torch.as_tensor(getattr(self, "sigmas", ())).float()
            self.question.grid = (self.timesteps.float(), sigmas)
            raise StopCall

        cls.set_timesteps = set_timesteps  # type: ignore[attr-defined]


@functools.cache
def _mixed(kind: type, scheduler: type) -> type:
    return type(f"{kind.__name__}{scheduler.__name__}", (kind, scheduler), {"init_noise_sigma": 1.0})


def stand_in(scheduler: Any, kind: type[StepKeeper | GridReader], question: StepRequest) -> Any:
    """Return a copy of a scheduler that is of its class and of ``kind``."""
    other = copy.copy(scheduler)
    bases: Any = (kind, type(scheduler))  # mypy takes no class for hashable
    other.__class__ = _mixed(*bases)
    other.__dict__["init_noise_sigma"] = 1.0
    other.question = question
    return other
