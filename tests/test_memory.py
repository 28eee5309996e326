"""Memory stays flat however long a run is."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from branchtree import plan, train
from branchtree.plugins import Callback

WARM, LAST = 40, 159
LATENT = (3, 128, 128)
BYTES = 4 * 3 * 128 * 128


class Memory(Callback):
    """The memory that is resident after an iteration, in bytes."""

    def __init__(self) -> None:
        self.resident: dict[int, int] = {}

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if iteration in {WARM, LAST}:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident[iteration] = pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_160_iterations_need_no_more_memory_than_40(
    guest_site: Path, plug: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is half of what one tree kept per iteration would add."""
    plug(guest_site)
    monkeypatch.setattr("branchtree_guest.model.GuestGaussian.latent_shape", LATENT)
    changes = {
        "tree.steps": 3,
        "tree.splits": [0],
        "batch.prompts": 1,
        "evaluation": None,
        "callbacks": [],
        "scoring.overlap": False,
        "run.iterations": LAST + 1,
        "run.checkpoint_every": 80,
        "run.sample_every": 1000,
        "run.tree_every": 80,
    }
    tree = plan("guest", changes).per_prompt.nodes * BYTES
    assert tree == 7 * BYTES  # 1 + 2 + 2 + 2 nodes
    memory = Memory()
    train("guest", changes, output=tmp_path / "run", callbacks=[memory])
    grown = memory.resident[LAST] - memory.resident[WARM]
    assert grown < (LAST - WARM) * tree / 2, f"{grown / 2**20:.0f} MiB more after {LAST - WARM} iterations"
