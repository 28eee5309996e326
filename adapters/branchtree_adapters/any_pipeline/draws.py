"""How a pipeline lays out the noise that it starts from: which numbers it draws, and where each of them comes to be."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree_adapters.any_pipeline.recording import State

DRAW = "randn_tensor"


@dataclass(frozen=True)
class Draw:
    """One sample's noise: numbers of shape ``drawn``, taken in the order ``index`` and given the sample's shape."""

    drawn: tuple[int, ...]
    index: Tensor | None  # None: as they are drawn
    shape: tuple[int, ...]

    def sample(self, generator: torch.Generator) -> Tensor:
        """Return noise of the sample's shape, float32, on the CPU."""
        noise = torch.randn(self.drawn, generator=generator)
        return (noise if self.index is None else noise.flatten()[self.index]).reshape(self.shape)


@contextmanager
def numbered_draws(pipeline: type) -> Iterator[list[Tensor]]:
    """A context in which a pipeline's module draws 0, 1, 2, ... in place of noise; yields what it drew."""
    drawn: list[Tensor] = []

    def count(shape: Sequence[int], *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        start = sum(each.numel() for each in drawn)
        # In float64: halves and singles have not enough digits.
        drawn.append(torch.arange(start, start + math.prod(shape), dtype=torch.float64).reshape(tuple(shape)))
        return drawn[-1].to(device or "cpu")

    modules = [sys.modules[kind.__module__] for kind in pipeline.__mro__ if kind.__module__ in sys.modules]
    own = {module: getattr(module, DRAW) for module in modules if hasattr(module, DRAW)}
    try:
        for module in own:
            setattr(module, DRAW, count)
        yield drawn
    finally:
        for module, function in own.items():
            setattr(module, DRAW, function)


def find_draw(value: Tensor, state: State, draws: Sequence[Tensor]) -> Draw:
    """Return how a state's leaf came of numbered draws; plain noise of its shape where it rearranges none."""
    numbers = state.taken(value.detach().cpu().double())
    for drawn in draws:
        first = float(drawn.flatten()[0])
        index = (numbers - first).long()
        drawn_all = bool((index >= 0).all()) and bool((index < drawn.numel()).all())
        if drawn_all and torch.equal(index + first, numbers) and len(index.unique()) == len(index):
            return Draw(tuple(drawn.shape), index, state.shape)
    return Draw(state.shape, None, state.shape)
