"""The example of masked diffusion over tokens, installed as a stranger's package and tested by its own tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from guests import install_guest
from public_surface import undocumented_uses
from test_conformance import run_tests
from training_runs import metrics

from branchtree import plan, train, write_report

TOKENS = Path(__file__).parents[1] / "examples" / "tokens"


@pytest.fixture(scope="module")
def tokens_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_guest(tmp_path_factory.mktemp("tokens_site"), TOKENS)


@pytest.mark.parametrize("name", ["test_addition.py", "test_sudoku.py", "test_tokens.py"])
def test_it_keeps_its_promises(name: str, tokens_site: Path, tmp_path: Path) -> None:
    outcomes = run_tests(tmp_path, (TOKENS / "tests" / name).read_text(encoding="utf-8"), tokens_site)
    assert (outcomes["failure"], outcomes["error"]) == ([], [])
    assert len(outcomes["passed"]) > 30


def test_it_uses_documented_names_only() -> None:
    assert undocumented_uses(TOKENS) == []


SMALL = {
    "batch.prompts": 8,
    "evaluation.limit": 4,
    "run.sample_prompts": 2,
    "run.iterations": 1,
    "optim.warmup": 0,
    "sampler.transition.temperature": 3.0,  # at which not all siblings tie
}


@pytest.mark.parametrize("recipe", ["addition", "sudoku", "addition+single", "sudoku+dancegrpo"])
def test_its_recipes_train_what_they_plan(
    recipe: str, tokens_site: Path, tmp_path: Path, plug: Callable[[Path], None]
) -> None:
    """Rows are those of the plan but for families that tie, and a report plays the order of revealing."""
    plug(tokens_site)
    train(recipe, SMALL, output=tmp_path / "run")
    (row,) = metrics(tmp_path / "run")
    planned = plan(recipe, SMALL)
    assert row["ratio/first_step_max_deviation"] == 0
    assert row["rows/rollout"] == planned.rollout_rows and 0 < row["rows/gradient"] <= planned.gradient_rows
    assert "tokens" in (tmp_path / "run" / "final" / "README.md").read_text(encoding="utf-8")
    report = write_report(tmp_path / "run").read_text()
    assert report.count("data:video/mp4") == 2 and report.count("data:image/webp") >= 16
