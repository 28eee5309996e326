"""Whether a run's groups carry signal: samples of one prompt must differ in reward for anything to be learnt."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import fmean

from branchtree.recipe.schema import Recipe
from branchtree.training.metrics import SPREAD_RATIO

LEAST_SPREAD = 0.2
"""Rewards that lie closer together within prompts than this fraction of their means' deviation are warned about."""
WATCHED = 10
"""Iterations over which the fraction is averaged, since one has few prompts."""


class SpreadWatch:
    """Looks for rewards that hardly differ within prompts, and warns once."""

    def __init__(self, recipe: Recipe, labels: Sequence[str]) -> None:
        """``labels`` are those of the rewards that are trained on."""
        self._recipe = recipe
        self._labels = labels
        self._ratios: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WATCHED))
        self._warned = False

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Take an iteration's figures, and return a warning if there is reason for one and it is the first."""
        for label in self._labels:
            ratio, ratios = metrics.get(f"reward/{label}/{SPREAD_RATIO}"), self._ratios[label]
            if ratio is None or self._warned:
                continue
            ratios.append(ratio)
            if len(ratios) == WATCHED and fmean(ratios) < LEAST_SPREAD:
                self._warned = True
                return (
                    f"reward '{label}': over {WATCHED} iterations, samples of one prompt differ by "
                    f"{fmean(ratios):.2g} of what prompts differ by, so there may be little to learn from; "
                    f"{self._change()}"
                )
        return None

    def _change(self) -> str:
        sampler = self._recipe.sampler
        if sampler.transition is not None:
            return f"raise the noise of sampler.transition '{sampler.transition.name}', or choose a finer reward"
        levels = (sampler.eta,) if isinstance(sampler.eta, float) else sampler.eta
        level = ", ".join(f"{each:g}" for each in levels)
        return (
            f"raise sampler.eta (it is {level}; 'branchtree plan' states the noise of a leaf), make more steps "
            "stochastic (tree.sde), or choose a finer reward"
        )
