"""Where the host waits for the device in an iteration on the pretended GPU, by line."""

# ruff: noqa: E501 (the lines are quoted)

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import Counts, pretend_gpu
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import small

from branchtree import train
from branchtree.core.gaussian import DanceSde
from branchtree.core.grid import time_grid
from branchtree.core.noise import CorrelatedSiblings, NoiseSource
from branchtree.core.rollout import Sampler, forwards, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.solvers import Solver
from branchtree.core.transfer import send
from branchtree.core.tree import grow
from branchtree.plugins import Callback

LIMIT = 3
"""Times that the host may wait for each forward of the rollout and of the gradient pass."""

STEPS = 8

SPREAD = "branchtree/core/diversity.py: return flat.cpu()"
"""Waits where states are on the device."""

ON_THE_DEVICE = {
    SPREAD: 1,
    "branchtree/core/rollout.py: densities = torch.cat(self._log_prob).cpu().split([len(level) for level in self._log_prob])": 1,
    "branchtree/training/objective.py: copied = torch.cat(flat).cpu().split([len(tensor) for tensor in tensors])": 1,
    "branchtree/training/engine.py: return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))": 1,
    "branchtree/training/processes.py: row = torch.tensor([list(mine)], dtype=torch.int64, device=self.accelerator.device)": 1,
    "branchtree/training/processes.py: return everyone.cpu()": 1,
    'branchtree/training/trainer.py: return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum"))': 2,
    "branchtree/training/timing.py: torch.cuda.synchronize(self.device)": 10,
}
"""Lines where the host waits in an iteration of one rollout and one optimiser step, and how often."""

ON_THE_HOST = {
    **{line: count for line, count in ON_THE_DEVICE.items() if line != SPREAD},
    "branchtree/core/rollout.py: self._states = [initial.to(store or initial.device)]": 1,
    "branchtree/core/rollout.py: following[send(children, following.device)] = reached.to(following.device)": STEPS,
}
"""The same under ``batch.states: host``."""

ELSEWHERE = (
    "adapters/",
    "rewards/",
    "branchtree/plugins/samples.py",
    "branchtree/plugins/scores.py",
    "branchtree/training/scoring.py",
    "branchtree/training/faults.py",
)
"""What decodes and scores."""


class Watcher(Callback):
    """Keeps what was counted from the end of the first iteration to that of the second."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self.blocking: Counter[str] = Counter()

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if iteration == 1:
            for site, times in self._counts.blocking().items():
                self.blocking[f"{site.path}: {site.text}"] += times
        self._counts.clear()


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def iteration(flux: Path, folder: Path, **changes: Any) -> Watcher:
    overrides = small(flux, run__iterations=2, run__checkpoint_every=9, run__sample_prompts=1, **changes)
    with pretend_gpu() as counts:
        watcher = Watcher(counts)
        train("quickstart", overrides, output=folder / "run", callbacks=[watcher])
    return watcher


@pytest.mark.parametrize(("states", "lines"), [("device", ON_THE_DEVICE), ("host", ON_THE_HOST)])
def test_each_line_makes_the_host_wait_so_often(states: str, lines: dict[str, int], flux: Path, tmp_path: Path) -> None:
    watcher = iteration(flux, tmp_path, tree__steps=STEPS, batch__states=states)
    found = {line: times for line, times in watcher.blocking.items() if not line.startswith(ELSEWHERE)}
    assert found == lines
    forwards_of_both = STEPS + 1  # all families of the gradient pass are one batch
    assert sum(found.values()) <= LIMIT * forwards_of_both


def test_the_documentation_has_the_same_lines() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = dict(row.strip("| ").split("` | ") for row in page.splitlines() if row.startswith("| `") and "py: " in row)
    assert {row.strip("`") for row in rows} == {*ON_THE_HOST, *ON_THE_DEVICE}


# --- the rollout by itself ---


@dataclass(frozen=True)
class Watched(NoiseSource):
    """Notes how often the host had waited when noise is drawn."""

    counts: Counts
    waits: list[int]

    def normal(self, *address: Any) -> Tensor:
        self.waits.append(self.counts.blocking().total())
        return super().normal(*address)


FACTORS = (2, 1, 2, 1, 1, 1, 1, 1)
STOCHASTIC = {"euler": (*[True] * 7, False), "dpm2m": (True, False, True, *[False] * 5)}


@pytest.mark.parametrize("store", [None, torch.device("cpu")])
@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_noise_is_drawn_while_a_forward_runs(solver: Solver, store: torch.device | None) -> None:
    """The host never waits between a forward and the noise of its children, and seldom after it."""
    stochastic = STOCHASTIC[solver]
    topology = grow([TreePlan(FACTORS, stochastic, stochastic)] * 2)
    sampler = Sampler(DanceSde(0.7), CorrelatedSiblings(), time_grid(8, 3.0), solver=solver)
    before: list[int] = []
    with pretend_gpu() as counts:
        source = Watched(0, 0, counts, [])

        def velocity(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
            before.append(counts.blocking().total())
            return latents * 0.5

        initial = send(torch.ones(2, 3, 4), torch.device("cuda", 0))
        tree = rollout(velocity, sampler, topology, initial, source, range(2), max_rows=3, store=store)
    assert len(before) == forwards(topology, 3) and set(source.waits) <= set(before)
    each = [after - earlier for earlier, after in pairwise(before)]
    copies = (2 if solver == "dpm2m" else 1) if store else 0  # states, and what the solver remembers
    assert max(each) == copies <= LIMIT
    assert tree.log_prob[1].device.type == "cpu"
