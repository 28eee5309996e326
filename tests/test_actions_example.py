"""The example of policies that make actions, installed as a stranger's package and tested by its own tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from public_surface import undocumented_uses
from test_conformance import run_tests
from training_runs import metrics

from branchtree import evaluate, load_recipe, plan, train, write_report
from branchtree.errors import RecipeError

ROOT = Path(__file__).parents[1]
ACTIONS = ROOT / "examples" / "actions"
SHORT = {"run.iterations": 2, "evaluation.limit": 4}


@pytest.mark.parametrize(("name", "least"), [("test_policies.py", 60), ("test_tasks.py", 12)])
def test_it_keeps_its_promises(name: str, least: int, examples_site: Path, tmp_path: Path) -> None:
    """PushT's environment may be missing; the unicycle needs none."""
    outcomes = run_tests(tmp_path, (ACTIONS / "tests" / name).read_text(encoding="utf-8"), examples_site)
    assert (outcomes["failure"], outcomes["error"]) == ([], [])
    assert len(outcomes["passed"]) > least


def test_it_uses_documented_names_only() -> None:
    assert undocumented_uses(ACTIONS) == []


@pytest.mark.parametrize("method", ["", "+single", "+branchgrpo", "+dancegrpo", "+mixgrpo"])
def test_the_methods_of_the_library_apply(
    method: str, examples_site: Path, plug: Callable[[Path], None], tmp_path: Path
) -> None:
    """Each trains the rows that its plan counts, from a ratio of exactly 1."""
    plug(examples_site)
    changes = {"run.iterations": 1, "batch.prompts": 4, "evaluation.limit": 4}
    planned = plan(f"unicycle{method}", changes)
    train(f"unicycle{method}", changes, output=tmp_path / "run")
    (row,) = metrics(tmp_path / "run")
    assert row["ratio/first_step_max_deviation"] == 0
    assert (row["rows/rollout"], row["rows/gradient"]) == (planned.rollout_rows, planned.gradient_rows)


def test_drives_are_drawn_in_the_report(examples_site: Path, plug: Callable[[Path], None], tmp_path: Path) -> None:
    """In grids and trees, from weights that come with the package, and judged one by one."""
    plug(examples_site)
    assert 0 < train("unicycle", {**SHORT, "evaluation.limit": 32}, output=tmp_path / "run").before["success"].mean < 1
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    assert len(list((tmp_path / "run" / "trees" / "iteration_000000").glob("leaf_*.png"))) == 16
    assert write_report(tmp_path / "run").read_text(encoding="utf-8").count("data:image/png") >= 3
    evaluate(tmp_path / "run", output=tmp_path / "evaluation")
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    assert {tuple(row["rewards"]) for row in rows} == {("reach", "success")}


def test_another_tasks_reward_is_refused(examples_site: Path, plug: Callable[[Path], None]) -> None:
    plug(examples_site)
    with pytest.raises(RecipeError, match=r"pusht_actions.*unicycle_actions"):
        train(load_recipe("unicycle", {"rewards": [{"reward": "pusht"}]}))


def test_the_page_of_modalities_runs(
    examples_site: Path, plug: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python that is no file of the package, in an empty folder and in order; the recipes that it shows load."""
    plug(examples_site)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "modalities.md").read_text(encoding="utf-8")
    own = re.sub(r"<!-- generated: (.*?) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    python, recipes = (
        re.findall(rf"^```{kind}\n(.*?)^```", own, re.DOTALL | re.MULTILINE) for kind in ("python", "yaml")
    )
    space: dict[str, object] = {}
    for code in python:
        exec(code, space)
    for index, recipe in enumerate(recipes):
        (tmp_path / f"{index}.yaml").write_text(recipe, encoding="utf-8")
        load_recipe(tmp_path / f"{index}.yaml")
    assert python and recipes
