"""The functions of the API take a recipe by its name, by its path, or loaded, alike; each can be varied by a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import branchtree
from branchtree import Recipe, load_recipe
from branchtree.errors import RecipeError
from branchtree.recipe import find_recipe, recipe_names
from branchtree.studies.common.subject import Subject
from branchtree.studies.compare import Budget, ComparisonRequest
from branchtree.studies.compare.plan import plan_runs
from branchtree.studies.diversity.request import DiversityRequest

Given = str | Path | Recipe
FORMS: dict[str, Callable[[], Given]] = {
    "name": lambda: "quickstart",
    "text": lambda: str(find_recipe("quickstart")),
    "path": lambda: find_recipe("quickstart"),
    "loaded": lambda: load_recipe("quickstart"),
}
GRID = ("tree.splits=dense,single", "tree.steps=14,16")
"""What follows from ``single`` must follow in a loaded recipe too."""
CHANGES: Sequence[dict[str, Any]] = (
    {},
    {"tree.strength": 2.0},
    {"tree.splits": "single"},
    {"tree.splits": "dense"},
    {"tree.splits": [0, 1]},
    {"tree.window.size": 2},
    {"lora.rank": 4},
    {"rewards.0.weight": 2.0},
)


@pytest.fixture(params=FORMS)
def given(request: pytest.FixtureRequest) -> Given:
    return FORMS[request.param]()


def expected() -> list[Recipe]:
    return [
        load_recipe("quickstart", {"tree.splits": splits, "tree.steps": steps})
        for splits in ("dense", "single")
        for steps in (14, 16)
    ]


def answer(recipe: str | Path | Recipe, changes: dict[str, Any]) -> Recipe | str:
    try:
        return load_recipe(recipe, changes)
    except RecipeError as error:
        return str(error).partition(": ")[2]


@pytest.mark.parametrize("name", recipe_names())
def test_a_loaded_recipe_is_changed_as_its_file_is(name: str) -> None:
    loaded = load_recipe(name)
    for changes in CHANGES:
        found, wanted = answer(loaded, changes), answer(name, changes)
        assert found == wanted or (isinstance(found, str) and isinstance(wanted, str) and wanted.endswith(found))
    assert loaded == load_recipe(name)
    with pytest.raises(TypeError, match="a loaded recipe takes no smoke"):
        load_recipe(loaded, smoke=True)


def test_diversity_varies_it(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[DiversityRequest] = []
    monkeypatch.setattr("branchtree.studies.diversity.run_study", lambda request, advance: requests.append(request))
    branchtree.diversity(given, grid=GRID, samples=64, output=tmp_path)
    [asked] = requests
    assert asked.recipe == load_recipe("quickstart")
    assert [planned.recipe for planned in asked.sets[-4:]] == expected()
    assert [planned.name for planned in asked.sets[4:6]] == [f"tree.splits=dense tree.steps={n}" for n in (14, 16)]


@pytest.mark.parametrize("alone", [True, False])
def test_compare_varies_it(given: Given, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[ComparisonRequest] = []
    monkeypatch.setattr("branchtree.studies.compare.run_comparison", lambda request, *_: requests.append(request))
    branchtree.compare(given if alone else [given], {"optim.lr": 1e-3}, seeds=[3], grid=GRID, iterations=2)
    [asked] = requests
    assert asked.budget == Budget(iterations=2)
    assert [row.name for row in asked.rows[:2]] == [f"quickstart tree.splits=dense tree.steps={n}" for n in (14, 16)]
    planned = [run.recipe for run in plan_runs(asked, tmp_path).runs]
    assert [recipe.tree.model_copy(update={"noise_seed": 1223627}) for recipe in planned] == [
        recipe.tree for recipe in expected()
    ]
    assert {recipe.optim.lr for recipe in planned} == {1e-3}


def test_evaluate_takes_it(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects: list[Subject] = []
    monkeypatch.setattr("branchtree.studies.evaluate.evaluate_subject", lambda subject, *_: subjects.append(subject))
    branchtree.evaluate(given)
    assert subjects == [Subject(load_recipe("quickstart"))]


@pytest.mark.parametrize("call", [branchtree.evaluate, branchtree.diversity, branchtree.plan])
def test_overrides_of_a_loaded_recipe_are_refused(call: Callable[..., object]) -> None:
    for options in ({"overrides": {"optim.lr": 1}}, {"smoke": True}):
        with pytest.raises(TypeError, match="takes neither overrides nor smoke"):
            call(load_recipe("quickstart"), **options)


def test_two_loaded_recipes_of_one_name_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'quickstart' comes twice; name one .* a loaded recipe by its own name"):
        branchtree.compare([load_recipe("quickstart"), load_recipe("quickstart")], output=tmp_path)
    with pytest.raises(TypeError, match="a loaded recipe takes no smoke"):
        branchtree.compare(load_recipe("quickstart"), smoke=True, output=tmp_path)
    assert list(tmp_path.iterdir()) == []
