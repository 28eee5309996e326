"""The parts of a report by themselves: pictures, tree layout, colours, numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from branchtree.report.curves import running_mean
from branchtree.report.images import embed
from branchtree.report.markup import MINUS, duration, number, signed
from branchtree.report.read import Node, Tree
from branchtree.report.tree_figure import colour, thinned
from branchtree.report.tree_layout import lay_out_tree


def minus(text: str) -> str:
    return text.replace("-", MINUS)


def test_pictures_outside_the_run_are_not_embedded(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "null\0.png", "none.png"):
        assert embed(tmp_path / "run" / name, tmp_path / "run", 64) is None


def test_large_pictures_are_cut_down(tmp_path: Path) -> None:
    Image.new("RGBA", (400, 100)).save(tmp_path / "large.png")
    picture = embed(tmp_path / "large.png", tmp_path, 100)
    assert picture is not None and picture.uri.startswith("data:image/jpeg")
    assert (picture.width, picture.height) == (400, 100)


def test_leaves_are_in_order_and_parents_between_their_children() -> None:
    parents = [None, 0, 0, 1, 1, 2, 2]
    nodes = [Node(id=i, depth=(0, 1, 1, 2, 2, 2, 2)[i], parent=parent) for i, parent in enumerate(parents)]
    layout = lay_out_tree(Tree(iteration=0, nodes=tuple(nodes)))
    rows = [layout.rows[i] for i in range(7)]
    assert rows[3:] == sorted(rows[3:]) and len(set(rows[3:])) == 4
    assert rows[1] == (rows[3] + rows[4]) / 2 and rows[0] == (rows[1] + rows[2]) / 2
    assert list(layout.columns) == sorted(layout.columns) and len(layout.columns) == 3


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [{"id": 0, "depth": 0}, {"id": 0, "depth": 0}],
        [{"id": 0, "depth": 1}],
        [{"id": 0, "depth": 0}, {"id": 1, "depth": 2, "parent": 0}],
        [{"id": 0, "depth": 0}, {"id": 1, "depth": 1, "parent": 1}],
    ],
)
def test_a_tree_that_is_none_is_refused(nodes: list[dict[str, int]]) -> None:
    with pytest.raises(ValueError):
        Tree.model_validate({"iteration": 0, "nodes": nodes})


def test_the_colour_scale_is_symmetric() -> None:
    assert colour(0.0, 2.0) == colour(0.0, 0.0) == "#e4e4e0"
    assert colour(2.0, 2.0) == colour(9.0, 2.0) == "#1f5fb4"
    assert colour(-2.0, 2.0) == "#c25700"
    assert colour(None, 2.0) == "none"


def test_many_trees_are_thinned_evenly() -> None:
    trees = [Tree(iteration=i, nodes=(Node(id=0, depth=0),)) for i in range(101)]
    assert [tree.iteration for tree in thinned(trees, 5)] == [0, 25, 50, 75, 100]
    assert thinned(trees[:5], 5) == trees[:5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0.0, "0"),
        (-3.0, "-3"),
        (48840.0, "48\u202f840"),
        (0.8825, "0.8825"),
        (0.37, "0.3700"),
        (-1.81234, "-1.812"),
        (12345.678, "12346"),
        (2.5e-5, "2.500e-05"),
    ],
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert number(value) == minus(text)


def test_changes_have_their_sign() -> None:
    assert (signed(0.5, 2), signed(-0.5, 2), signed(0.0)) == ("+0.50", f"{MINUS}0.50", "0")


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.250 s"), (741.5, "12 min 22 s"), (7300, "2 h 1 min")])
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_running_mean_skips_gaps() -> None:
    nan = float("nan")
    assert running_mean([1.0, nan, 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
    assert running_mean([nan], 3)[0] != 0


def test_importing_the_report_loads_no_plotting() -> None:
    code = "import sys, branchtree.report; print({'matplotlib', 'PIL', 'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
