"""Every objective under every method: it is refused by the plan, or its first iteration learns something."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_flux import tiny_flux
from training_runs import opened, small

from branchtree import plan
from branchtree.errors import RecipeError
from branchtree.training.iteration import iterate
from branchtree.training.metrics import gather_metrics

JUDGED = [{"reward": "digits"}, {"reward": "digits", "label": "judge", "classifier": "heldout", "weight": 0}]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "centred": {"loss.ratio": "centred", "loss.weighting": "gradient"},
    "divergence": {"loss.trust": "divergence", "loss.weighting": "noise", "loss.divide_by_dt": True},
    "nft": {"loss.kind": "nft", "loss.weighting": "none"},  # which a method may set, and forward objectives refuse
    "awm": {"loss.kind": "awm", "loss.weighting": "none", "loss.inner_nodes": True},
    "vgrpo": {"loss.kind": "vgrpo", "loss.weighting": "none"},
    "crd": {"loss.kind": "crd", "loss.weighting": "none", "loss.share_draws": "siblings"},
}
METHODS = ("branchgrpo", "single", "ode", "flowgrpo", "mix", "width_pruned", "depth_pruned", "extreme_pruned",
           "adaptive")  # fmt: skip
KL: tuple[dict[str, Any], ...] = ({}, {"loss.kl": 0.1}, {"loss.kl": 0.1, "loss.gate.share": 0.2, "rewards": JUDGED})
STEPS = (1, 2)

Case = tuple[str, str, int, int]
"""An objective, a method, which of ``KL``, and the optimiser steps of an iteration."""


def covering() -> list[Case]:
    """Two cases for each method, such that each objective meets each number of steps and nearly every KL."""
    names = list(OBJECTIVES)
    return [
        (names[(5 * i + 6 * half) % len(names)], method, (i + 2 * half) % len(KL), STEPS[half])
        for half in range(2)
        for i, method in enumerate(METHODS)
    ]


def overrides(case: Case, model: Path) -> dict[str, Any]:
    objective, _, kl, steps = case
    own = {key: value for key, value in small(model).items() if not key.startswith(("tree.", "sampler."))}
    short = {"tree.steps": 12, "loss.draws": 2, "optim.steps_per_iteration": steps, "batch.prompts": 2}
    return {**own, **short, **OBJECTIVES[objective], **KL[kl]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_the_cases_cover_each_choice_with_each_number_of_steps() -> None:
    for names, at in ((OBJECTIVES, 0), (METHODS, 1)):
        assert {(case[at], case[3]) for case in covering()} == set(product(names, STEPS))
    assert {case[2:] for case in covering()} == set(product(range(len(KL)), STEPS))


@pytest.mark.parametrize("objective", [name for name, keys in OBJECTIVES.items() if "loss.kind" in keys])
def test_depth_pruning_is_refused_where_no_edge_is_trained(objective: str, model: Path) -> None:
    case = (objective, "depth_pruned", 0, 1)
    with pytest.raises(RecipeError, match=r"pruning\.kind: .*depth pruning leaves out edges alone; set it to none"):
        plan("quickstart+depth_pruned", overrides(case, model))


@pytest.mark.parametrize("case", covering(), ids=lambda case: "-".join(map(str, case)))
def test_a_combination_learns(case: Case, model: Path, tmp_path: Path) -> None:
    """Its first iteration does no more than the plan says, and every optimiser step changes the weights, finitely."""
    changes, recipe = overrides(case, model), f"quickstart+{case[1]}"
    planned, session = plan(recipe, changes), opened(recipe, changes, tmp_path / "run")
    before = [parameter.detach().clone() for parameter in session.updater.engine.parameters.values()]
    row = gather_metrics(session, iterate(session, 0))
    assert row["steps/taken"] == case[3] and row["steps/refused"] == 0
    assert 0 < row["grad_norm"] < math.inf and math.isfinite(row["loss"])
    assert row["rows/rollout"] == planned.rollout_rows and 0 < row["rows/gradient"] <= planned.gradient_rows
    after = list(session.updater.engine.parameters.values())
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
