"""A recipe's name leads to no folder but its own, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import thorough

from branchtree import load_recipe, train
from branchtree.errors import OutputError, RecipeError
from branchtree.files.names import LONGEST, PROJECT_LENGTH, checked_name, folder_name, project_name
from branchtree.studies.common.subject import find_subject
from branchtree.studies.compare import ComparisonRequest
from branchtree.studies.compare.request import Row

WRONG = [
    "../../evil",
    "/etc/evil",
    "a/b",
    "..\\evil",
    "",
    "  ",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "a\ud800b",
    "a\u2028b",
    "x" * 300,
]
WRONG += ["é" * 120]  # 240 bytes
SAFE = {
    "quickstart": "quickstart",
    "quickstart+mixgrpo": "quickstart+mixgrpo",
    "Größe 1, second try": "Größe 1, second try",
    "seeds: 1|2?": "seeds_ 1_2_",
    "con": "con_",
    "LPT1.txt": "LPT1.txt_",
    "console": "console",
    ".hidden": "hidden",
    "dots...": "dots",
    "... ": "_",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_is_no_folders_name_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in/it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in/it")
    with pytest.raises(RecipeError, match=r"^override name=.*: (name: a name |holds bytes that are no text)") as told:
        train("quickstart", {"name": name})
    assert str(told.value).isprintable()
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "it"]


def test_the_line_of_a_wrong_name_is_told_and_so_is_the_file_that_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nname: ../evil\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: name: a name holds no /"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / f"{'x' * 200}.yaml").write_text("extends: quickstart\n")
    with pytest.raises(RecipeError, match=r"x\.yaml: name: a name has at most 180 bytes"):
        load_recipe(tmp_path / f"{'x' * 200}.yaml")
    (tmp_path / f"{'x' * 178}.yaml").write_text("extends: quickstart\n")
    with pytest.raises(RecipeError, match="name: a name has at most 180 bytes"):
        load_recipe(f"{tmp_path}/{'x' * 178}.yaml+mixgrpo")


@pytest.mark.parametrize(("name", "folder"), SAFE.items())
def test_other_names_stay_or_lose_what_file_systems_do_not_take(name: str, folder: str) -> None:
    assert folder_name(checked_name(name)) == folder
    recipe = load_recipe("quickstart", {"name": name})
    assert find_subject(recipe).output("evaluation") == Path("runs") / f"evaluation-{folder}"


def test_the_default_output_is_the_names_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a_b").mkdir(parents=True)
    (tmp_path / "runs/a_b/recipe.yaml").write_text("")
    with pytest.raises(OutputError, match=r"runs/a_b: is not empty, and holds no run"):
        train("quickstart", {"name": "a:b"})


@thorough
@given(st.text(st.characters(codec=None), max_size=400))
def test_any_text_makes_one_folder_below_its_parent_and_one_project(text: str) -> None:
    folder, project = folder_name(text), project_name(text)
    parent = Path("/runs")
    assert (parent / folder).parent == parent and (parent / folder).resolve() == parent / folder != parent
    assert 0 < len(folder.encode()) <= LONGEST + 1 and not set(folder) & set('<>:"/\\|?*\0')
    assert 0 < len(project) <= PROJECT_LENGTH and project.isascii() and not set(project) & set("/\\#?%:+ ")


@pytest.mark.parametrize("name", ["../../evil", "nul", "名" * 120, "a/b@seed=1", ".."])
def test_a_rows_folder_lies_in_the_comparison(name: str) -> None:
    request = ComparisonRequest((Row(name, "quickstart"),), (0,))
    folder = request.rows[0].folder
    assert Path("/out", folder).resolve().parent == Path("/out")
    assert len(folder.encode()) <= LONGEST + 1 and folder.lower() != "nul"
