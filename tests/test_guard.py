"""Updates that would do harm are left out, counted, and end the run; the KL to the start is measured without weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_flux import tiny_flux
from training_runs import largest_difference, metrics, small, weights

from branchtree import train
from branchtree.errors import BranchTreeError
from branchtree.recipe.schema import OptimSection
from branchtree.training.update import UpdateGuard


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_the_guard_counts_in_a_row() -> None:
    guard = UpdateGuard(OptimSection(refuse_above=10.0, max_refused=2))
    norms = [1.0, math.nan, 11.0, 10.0, math.inf, 1e9]
    assert [guard.admits(norm, 0) for norm in norms] == [True, False, False, True, False, False]
    with pytest.raises(BranchTreeError) as told:
        guard.admits(11.0, 7)
    assert "iteration 7: the gradient's norm 11 is above optim.refuse_above 10; with it 3 updates in a row" in str(
        told.value
    )
    with pytest.raises(BranchTreeError, match="the gradient is not finite; with it 1 updates"):
        UpdateGuard(OptimSection(max_refused=0)).admits(math.nan, 0)


def test_a_refused_update_leaves_the_weights_and_is_counted(model: Path, tmp_path: Path) -> None:
    never = small(model, run__iterations=2, optim__refuse_above=1e-12, optim__max_refused=2)
    train("quickstart", never, output=tmp_path / "never")
    train(
        "quickstart", small(model, run__iterations=2, optim__lr=1e-30, optim__weight_decay=0.0), output=tmp_path / "no"
    )
    assert [(row["steps/taken"], row["steps/refused"]) for row in metrics(tmp_path / "never")] == [(0, 1), (0, 1)]
    assert largest_difference(weights(tmp_path / "never"), weights(tmp_path / "no")) == 0
    with pytest.raises(BranchTreeError, match=r"iteration 2: .* with it 3 updates in a row were left out"):
        train("quickstart", {**never, "run.iterations": 4}, output=tmp_path / "ended")
    assert len(metrics(tmp_path / "ended")) == 2


def test_the_kl_can_be_measured_without_being_trained_on(model: Path, tmp_path: Path) -> None:
    train("quickstart", small(model, run__iterations=3, optim__lr=1e-3), output=tmp_path / "plain")
    train("quickstart", small(model, run__iterations=3, optim__lr=1e-3, loss__kl_every=2), output=tmp_path / "watched")
    rows = metrics(tmp_path / "watched")
    assert ["kl" in row for row in rows] == [True, False, True]
    assert rows[0]["kl"] == 0 and rows[2]["kl"] > 0
    assert rows[2]["rows/reference"] == rows[2]["rows/gradient"]
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "watched")) == 0
