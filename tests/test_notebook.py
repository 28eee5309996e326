"""The notebook runs from a new kernel and shows what it showed, and what is released agrees on its version."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build_notebook(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("build_notebook")


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    return ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.\d+|\d+", text)]


def test_the_notebook_shows_what_it_showed(build_notebook: object) -> None:
    written = nbformat.read(build_notebook.NOTEBOOK, as_version=4)  # type: ignore[attr-defined]
    now = build_notebook.executed(build_notebook.NOTEBOOK)  # type: ignore[attr-defined]
    assert kinds(now) == kinds(written)
    for index, (before, after) in enumerate(zip(printed(written), printed(now), strict=True)):
        assert re.sub(r"[\d.-]+", "#", after) == re.sub(r"[\d.-]+", "#", before), f"cell {index}"
        assert numbers(after) == pytest.approx(numbers(before), abs=0.05), f"cell {index}"  # other CPUs round otherwise


def test_all_files_name_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "shown"),
    [("notebooks/quickstart.ipynb", "../tutorial.html#install"), ("a.md", "../tutorial.md#install")],
)
def test_links_of_a_notebook_lead_to_the_sites_pages(monkeypatch: pytest.MonkeyPatch, source: str, shown: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    links = importlib.import_module("notebook_links")
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
    html = '<a href="https://example.org/x.md">x</a> <a href="../tutorial.md#install">tutorial</a>'
    assert links.on_page_content(html, page=page) == html.replace("../tutorial.md#install", shown)
