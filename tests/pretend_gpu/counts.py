"""What crossed between host and device and what made the host wait, by the library's line that asked for it."""

from __future__ import annotations

import linecache
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = tuple(str(ROOT / folder) + "/" for folder in ("branchtree", "adapters", "rewards", "benchmarks"))


class Event(StrEnum):
    """A transfer or a wait."""

    TO_HOST = "to host"
    TO_DEVICE = "to device"
    SYNCHRONISE = "synchronise"
    ASYNC_TO_HOST = "to host, async"
    ASYNC_TO_DEVICE = "to device, async"

    @property
    def blocks(self) -> bool:
        """Whether the host waits for the device."""
        return not self.value.endswith("async")


@dataclass(frozen=True, order=True)
class Site:
    """The innermost line of the library on the stack when something happened."""

    path: str  # from the root of the repository
    line: int
    function: str

    @property
    def text(self) -> str:
        """The line itself."""
        return linecache.getline(str(ROOT / self.path), self.line).strip()

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.function})"


OUTSIDE = Site("outside of the library", 0, "")


def current_site() -> Site:
    """The library's line that is at work, whatever other libraries it called."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(LIBRARY):
            path = str(Path(code.co_filename).relative_to(ROOT))
            return Site(path, frame.f_lineno, code.co_qualname)
        frame = frame.f_back
    return OUTSIDE


@dataclass
class Counts:
    """How often each thing happened at each line, from all threads together."""

    events: Counter[tuple[Event, Site]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, event: Event) -> None:
        """Count one event at the current line."""
        site = current_site()
        with self._lock:
            self.events[event, site] += 1

    def clear(self) -> None:
        """Begin again at 0."""
        self.events.clear()

    def blocking(self) -> Counter[Site]:
        """How often the host waited at each line."""
        found: Counter[Site] = Counter()
        for (event, site), times in self.events.items():
            if event.blocks:
                found[site] += times
        return found

    def table(self) -> str:
        """All counts, the most frequent first, one a line."""
        rows = [f"{times:7}  {event.value:16}  {site}" for (event, site), times in self.events.most_common()]
        return "\n".join(rows)
