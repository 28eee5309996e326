"""Reports of runs that are unfinished, damaged or no runs at all, and how a report is put in place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import fake_run
import pytest
from report_page import page

from branchtree.errors import OutputError
from branchtree.report import write_page
from branchtree.report.page import MARK
from branchtree.report.read import read_run


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run that has written its recipe and two iterations, and nothing else."""
    run = fake_run.build_run(tmp_path / "run", iterations=2, planned=9, every=9)
    for name in ("timing.jsonl", "evaluation.jsonl"):
        (run / name).unlink()
    for name in ("samples", "trees"):
        shutil.rmtree(run / name)
    return run


def test_a_run_in_progress_says_how_far_it_is(tmp_path: Path) -> None:
    run = fake_run.build_run(tmp_path / "run", iterations=23, planned=300)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 23, "reward/digits/me')
    halfway = page(run)
    assert "not finished: 23 of 300 iterations" in halfway.text
    assert "The last line of metrics.jsonl is incomplete and was left out." in halfway.text


def test_parts_that_were_not_written_are_left_out(bare: Path) -> None:
    shown = page(bare)
    headings = re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', shown.raw)
    assert headings == ["Training rewards", "Credit by split", "Credit by depth", "Update signals", "Details"]
    assert "training reward, mean of the first and last iteration" in shown.text
    assert shown.count("aside") == 0


def test_a_run_without_a_finished_iteration_has_a_page(bare: Path) -> None:
    (bare / "metrics.jsonl").write_text("")
    assert "No iteration has finished yet." in page(bare).text


def test_missing_and_impossible_figures_are_gaps(bare: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"iteration": 0, "reward/digits/mean": None, "loss": float("nan")},
        {"iteration": 1, "reward/digits/mean": 0.25, "loss": float("inf"), "grad_norm": "none"},
        {"iteration": 2, "odd": True, "huge": 10**400},
    ]
    fake_run.write_lines(bare / "metrics.jsonl", rows)
    shown = page(bare)
    assert "between 0.2500 and 0.2500" in shown.raw
    assert "nan" not in shown.text and "inf" not in shown.text


def test_an_iteration_that_was_run_again_counts_once(bare: Path) -> None:
    fake_run.write_lines(
        bare / "metrics.jsonl", [{"iteration": i, "loss": loss} for i, loss in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0))]
    )
    run = read_run(bare)
    assert [row["loss"] for row in run.metrics] == [1.0, 3.0, 4.0]
    assert run.done == 3


def test_damaged_files_are_named_and_left_out(tmp_path: Path) -> None:
    run = fake_run.build_run(tmp_path / "run", iterations=3, every=1)
    (run / "trees" / "iteration_000001.json").write_text('{"iteration": 1, "nodes"')
    (run / "samples" / "iteration_000003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "trees" / "iteration_000002" / "leaf_00.png").unlink()
    (run / "summary.json").write_text("[")
    (run / "evaluation.jsonl").write_text('{"iteration": 0, "figures": {"digits": 3}}\nnonsense\n')
    damaged = page(run)
    assert "trees/iteration_000001.json cannot be read" in damaged.text
    assert "summary.json cannot be read" in damaged.text
    assert "figures of iteration 0 in evaluation.jsonl were left out" in damaged.text
    assert "The picture cannot be read." in damaged.text
    assert damaged.count("details", "tree") == 2
    assert damaged.count("rect", "missing") == 1


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_refused(bare: Path, name: str) -> None:
    (bare / name).unlink()
    with pytest.raises(OutputError, match=rf"{re.escape(str(bare))}: is not a run directory, it holds no {name}; give"):
        write_page(bare)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_a_recipe_that_is_none_is_refused(bare: Path, text: str) -> None:
    (bare / "recipe.yaml").write_text(text)
    with pytest.raises(OutputError, match=r"recipe\.yaml: .*; restore the recipe"):
        write_page(bare)


def test_the_page_is_replaced_whole_or_not_at_all(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = bare / "report.html"
    target.write_text(old := f"<html>{MARK}</html>")
    (bare / "metrics.jsonl").write_text("")
    replaced: list[str] = []
    real = os.replace

    def replace(source: str, goal: Path) -> None:
        assert target.read_text() == old and Path(source).parent == bare
        replaced.append(Path(source).read_text(encoding="utf-8"))
        real(source, goal)

    monkeypatch.setattr(os, "replace", replace)
    assert write_page(bare) == target
    assert replaced == [target.read_text(encoding="utf-8")]
    assert replaced[0].endswith("</html>\n")


def test_a_page_that_cannot_be_written_leaves_nothing(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: str, goal: Path) -> None:
        raise OSError(28, "No space left on device")

    (bare / "metrics.jsonl").write_text("")
    before = sorted(bare.iterdir())
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match=r"report\.html: cannot be written: No space left on device; make"):
        write_page(bare)
    assert sorted(bare.iterdir()) == before
