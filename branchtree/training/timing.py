"""Wall-clock seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Adds up the seconds spent in named phases, waiting for the device at the end of each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    background: dict[str, float] = field(default_factory=dict)  # of other threads, not part of the total
    started: float = field(default_factory=time.perf_counter)
    _inner: float = 0.0  # of the phases inside the one that is under way

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under a name. A phase inside another does not count as the outer one's."""
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole

    def report(self) -> dict[str, float]:
        """Seconds by phase, what no phase counted as ``other``, ``total``, and those in the background."""
        total = time.perf_counter() - self.started
        other = max(total - sum(self.seconds.values()), 0.0)
        return {**self.seconds, "other": other, "total": total, **self.background}
