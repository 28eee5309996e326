"""The ``guest_best`` callback."""

import json
from collections.abc import Mapping
from pathlib import Path

import pydantic

from branchtree.plugins import Callback


class BestIterationConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``metric`` is the name, as in metrics.jsonl, of what should be high."""

    metric: str


class BestIteration(Callback):
    """Writes ``best.json``: the iteration whose metric was highest."""

    def __init__(self, config: BestIterationConfig) -> None:
        self.config = config
        self._best: tuple[float, int] | None = None

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Keep the best so far."""
        value = metrics.get(self.config.metric)
        if value is not None and (self._best is None or value > self._best[0]):
            self._best = (value, iteration)

    def on_end(self, output: Path) -> None:
        """Write it."""
        if self._best is not None:
            value, iteration = self._best
            (output / "best.json").write_text(json.dumps({"iteration": iteration, self.config.metric: value}))
