"""Paths in a recipe are absolute, whoever wrote them and wherever they stand; names that are no paths stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_flux import tiny_flux
from training_runs import small

from branchtree import evaluate, load_recipe, train
from branchtree.errors import RecipeError
from branchtree.files.paths import LocalPath, PathKey, PathOrName
from branchtree.recipe.paths import local_paths, path_values
from branchtree.recipe.source import write_yaml

PATHS = [
    ("data.prompts", "texts/p.txt"),
    ("data.prompts", "p"),
    ("data.folder", "pictures"),
    ("evaluation.prompts", "./p.jsonl"),
    ("evaluation.folder", "../pictures"),
    ("run.embeddings", "cache"),
    ("model.path", "./absent"),
    ("model.path", "../absent"),
    ("rewards.1.path", "weights/heads"),  # it exists
    ("rewards.1.tokenizer", "./words"),
    ("rewards.1.path", "~/weights.safetensors"),
]
NAMES = [
    ("data.prompts", "hub:org/name"),
    ("run.embeddings", "user"),
    ("model.path", "org/name"),
    ("model.path", "bundled:digits_flux"),
    ("rewards.1.path", "random:small"),
    ("rewards.1.path", "org/name"),
    ("rewards.1.path", ""),
    ("data.prompts", "~no_such_user/p.txt"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some files."""
    folder = tmp_path / "here"
    (folder / "weights/heads").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def value(recipe: Any, key: str) -> Any:
    at = recipe.model_dump(mode="json")
    for part in key.split("."):
        at = at[int(part) if part.isdecimal() else part]
    return at


def asked(key: str, given: str) -> dict[str, Any]:
    """Overrides of the quickstart with a second reward, whose settings are its own."""
    return {"rewards": [{"reward": "digits"}, {"reward": "hps"}], key: given}


@pytest.mark.parametrize(("key", "given"), PATHS)
def test_a_path_in_an_override_is_relative_to_the_working_directory(key: str, given: str, here: Path) -> None:
    wanted = Path(given).expanduser() if given.startswith("~") else here / given
    assert value(load_recipe("quickstart", asked(key, given)), key) == str(wanted)


@pytest.mark.parametrize(("key", "given"), NAMES)
def test_what_is_no_path_stays_as_it_is(key: str, given: str, here: Path) -> None:
    assert value(load_recipe("quickstart", asked(key, given)), key) == given


@pytest.mark.parametrize(("key", "given"), PATHS)
def test_a_path_in_a_file_is_relative_to_that_file(key: str, given: str, here: Path, tmp_path: Path) -> None:
    """The key is in a base of another folder, which does not say which plug-in it belongs to."""
    far = tmp_path / "far"
    (far / "weights/heads").mkdir(parents=True)
    section, *rest = key.split(".")
    if section == "rewards":
        lines: dict[str, Any] = {"rewards": [{"reward": "digits"}, {"reward": "hps", rest[-1]: given}]}
    else:
        lines = {section: {rest[0]: given}}
    (far / "base.yaml").write_text(write_yaml({"extends": "quickstart", **lines}))
    (tmp_path / "mine.yaml").write_text("extends: far/base.yaml\noptim: {lr: 1e-3}\n")
    wanted = Path(given).expanduser() if given.startswith("~") else far / given
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert value(recipe, key) == str(wanted)
    again = tmp_path / "elsewhere" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(write_yaml(recipe.model_dump(mode="json")))
    assert load_recipe(again).model_dump() == {**recipe.model_dump()}


def test_a_name_that_exists_in_the_working_directory_alone_is_the_path_there(here: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nmodel: {path: weights/heads}\n")
    assert load_recipe(tmp_path / "mine.yaml").model.options["path"] == str(here / "weights/heads")


def test_a_wrong_path_is_told_with_the_line_that_gave_it(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quickstart\ndata:\n  folder: [a]\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:3: data\.folder: input should be a valid string"):
        load_recipe(file)


def test_paths_of_the_python_kind_are_taken_in_overrides(here: Path) -> None:
    recipe = load_recipe("quickstart", {"data.prompts": Path("p.txt"), "model.path": Path("weights/heads")})
    assert recipe.data.prompts == str(here / "p.txt")
    assert local_paths(recipe.model_dump())["model.path"] == here / "weights/heads"


def test_a_plug_in_declares_its_paths_by_their_type(here: Path) -> None:
    import pydantic

    class Inner(pydantic.BaseModel):
        file: Path

    class Settings(pydantic.BaseModel):
        plain: str = ""
        one: LocalPath | None = None
        many: list[PathOrName] = []
        inner: Inner | None = None
        named: dict[str, PathOrName | int] = {}

    data = {"plain": "./x", "one": "a", "many": ["./b", "c"], "inner": {"file": "d"}, "named": {"e": "./f", "g": 1}}
    found = {at: key.absolute(text, (here,)) for at, text, key in path_values(Settings, data)}
    assert found == {
        ("one",): str(here / "a"),
        ("many", 0): str(here / "b"),
        ("many", 1): "c",
        ("inner", "file"): str(here / "d"),
        ("named", "e"): str(here / "f"),
    }
    assert PathKey(always=True).absolute("a\0b", (here,)).startswith(str(here))  # refused where it is opened
    assert PathKey(always=False).absolute("a\0b" + "c" * 5000, (here,)).startswith("a\0b")


def test_a_run_made_with_relative_paths_is_run_again_and_evaluated_from_elsewhere(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_flux(here / "model")
    (here / "p.txt").write_text("a seven\na three\n")
    (here / "held.txt").write_text("a one\na five\n")
    changes = small(model, run__iterations=1, data__prompts="p.txt")
    changes["model.path"] = str(model.relative_to(here))
    changes["evaluation"] = {"prompts": "held.txt", "rewards": [{"reward": "digits"}]}
    train("quickstart", changes, output="run")
    monkeypatch.chdir(tmp_path)
    again = train(here / "run/recipe.yaml", output=tmp_path / "again")
    assert again.finished
    lines = [(run / "metrics.jsonl").read_text() for run in (here / "run", tmp_path / "again")]
    assert json.loads(lines[0]) == json.loads(lines[1])
    assert evaluate(here / "run", output=tmp_path / "judged").prompts == 2
