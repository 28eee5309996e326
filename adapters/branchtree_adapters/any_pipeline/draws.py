"""How a pipeline lays out the noise that it starts from: which numbers it draws, and where each of them comes to be."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import ModelError
from branchtree_adapters.any_pipeline.recording import Leaf, State

DRAW = "randn_tensor"
MIXED = 0.01
"""What of a pipeline's starting noise may be something else: HunyuanVideo mixes a thousandth of an image in."""


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
def numbered_draws(pipeline: type, same: float | None = None) -> Iterator[list[Tensor]]:
    """A context in which a pipeline's module draws 0, 1, ..., or ``same``, in place of noise; yields what it drew."""
    drawn: list[Tensor] = []

    def count(shape: Sequence[int], *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        start = sum(each.numel() for each in drawn)
        # In float64: halves and singles have not enough digits.
        numbers = torch.arange(start, start + math.prod(shape), dtype=torch.float64).reshape(tuple(shape))
        drawn.append(numbers if same is None else torch.full_like(numbers, same))
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


def find_draws(states: Sequence[State], record: Callable[[], Mapping[Leaf, Any]], pipeline: type) -> list[Draw]:
    """Return how states come of what a pipeline draws; plain noise where it rearranges none.

    Args:
        states: The samples that are denoised.
        record: Returns what the pipeline's methods give.
        pipeline: Its class.

    Raises ModelError for a pipeline that mixes something else into its noise, as from an image to start from.
    """
    with numbered_draws(pipeline) as draws:
        leaves = record()
    found = [find_draw(state.numbers(leaves), state, draws) for state in states]
    if None in found and draws:
        found = _find_mixed(states, leaves, record, pipeline, draws)
    return [draw or Draw(state.shape, None, state.shape) for draw, state in zip(found, states, strict=True)]


def find_draw(numbers: Tensor, state: State, draws: Sequence[Tensor]) -> Draw | None:
    """Return how a state's numbers came of numbered draws."""
    for drawn in draws:
        first = float(drawn.flatten()[0])
        index = (numbers - first).round().long()
        drawn_all = bool((index >= 0).all()) and bool((index < drawn.numel()).all())
        if (
            drawn_all
            and torch.allclose(index.double() + first, numbers, rtol=0, atol=0.01)
            and len(index.unique()) == len(index)
        ):
            return Draw(tuple(drawn.shape), index, state.shape)
    return None


def _find_mixed(
    states: Sequence[State],
    leaves: Mapping[Leaf, Any],
    record: Callable[[], Mapping[Leaf, Any]],
    pipeline: type,
    draws: Sequence[Tensor],
) -> list[Draw | None]:
    """Find draws that are scaled, and have something added to them."""
    given = []
    for same in (0.0, 1.0):
        with numbered_draws(pipeline, same):
            given.append(record())
    found = []
    for state in states:
        none, one = (state.numbers(each) for each in given)
        share = one - none
        if bool(share.any()) and not bool(((share - 1).abs() <= MIXED).all()):
            raise ModelError(
                f"{pipeline.__name__} starts from latents of which noise is {float(share.min()):.2g}; only pipelines "
                "that start from noise are trained (a strength, where there is one, must be 1)."
            )
        found.append(find_draw((state.numbers(leaves) - none) / share, state, draws) if bool(share.any()) else None)
    return found
