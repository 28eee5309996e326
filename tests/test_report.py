"""The report of a finished run: self-contained, described, true to the files, safe against their text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fake_run
import pytest
from report_page import Page, assert_described, assert_self_contained, assert_well_formed, page

from branchtree.report.images import embed
from branchtree.report.markup import MINUS, duration, escape, number, signed

EVIL = '<script>alert("x")</script> & <img src=https://example.org/x.png> \u202e\x00\ud800'


def minus(text: str) -> str:
    return text.replace("-", MINUS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.build_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def shown(finished: Path) -> Page:
    return page(finished)


def test_the_page_needs_nothing_beside_itself(shown: Page) -> None:
    assert_self_contained(shown)


def test_the_page_is_well_formed(shown: Page) -> None:
    assert_well_formed(shown)


def test_every_picture_is_described(shown: Page) -> None:
    assert_described(shown)


def test_the_head_says_what_was_reached(shown: Page, finished: Path) -> None:
    assert "finished: 60 iterations" in shown.text
    assert "digits-branch" in shown.text and "asked for." in shown.text
    lines = [json.loads(line) for line in (finished / "evaluation.jsonl").read_text().splitlines()]
    before, after = lines[0]["figures"]["digits"]["mean"], lines[-1]["figures"]["digits"]["mean"]
    assert minus(f"{before:.3f} \u2192 {after:.4f}") in shown.text
    assert f"+{after - before:.3f}" in shown.text
    assert "12 min 22 s" in shown.text


def test_held_out_figures_are_those_of_the_run(shown: Page, finished: Path) -> None:
    for line in (finished / "evaluation.jsonl").read_text().splitlines():
        for figure in json.loads(line)["figures"].values():
            assert f"<td>{number(figure['mean'])}</td>" in shown.raw
    assert "638 of 640" in shown.text
    assert "640 of 640" not in shown.text  # a column is only shown where something failed


def test_times_are_sums_over_the_run(shown: Page, finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "timing.jsonl").read_text().splitlines()]
    update, total = (sum(row[phase] for row in rows) for phase in ("update", "total"))
    assert duration(update) in shown.text
    assert f"{100 * update / total:.1f}\u202f%" in shown.text


def test_credit_stands_beside_what_independent_leaves_would_show(shown: Page) -> None:
    assert re.search(r"0 step 0 31.0\u202f% 6.7\u202f% 4.65", shown.text)
    assert re.search(r"3 step 9 18.0\u202f% 53.3\u202f% 0.337", shown.text)


def test_every_metric_is_listed(shown: Page, finished: Path) -> None:
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert f"<code>grad_norm</code></th><td>{number(first['grad_norm'])}</td>" in shown.raw
    for key in first:
        assert key == "iteration" or f"<code>{key}</code>" in shown.raw


def test_curves_are_shown_against_iterations_and_rows(shown: Page) -> None:
    assert (shown.count("div", "by-iteration"), shown.count("div", "by-rows")) == (1, 1)
    plots = [attrs["aria-label"] or "" for tag, attrs in shown.tags if tag == "svg"]
    assert any(label.startswith("Training reward digits against rows: from") for label in plots)
    for title in ("Loss", "Gradient norm", "Clipped edges", "Log-density mismatch", "Rows per iteration"):
        assert any(label.startswith(title) for label in plots)


def test_plots_follow_the_colours_of_the_page(shown: Page) -> None:
    assert "prefers-color-scheme: dark" in shown.raw
    assert "var(--c0)" in shown.raw
    assert not re.search(r"#0000[af]\d", shown.raw)
    for svg in re.findall(r'<svg class="plot".*?</svg>', shown.raw, flags=re.DOTALL):
        assert not re.findall(r"(?:fill|stroke): #(?!ffffff; opacity: 0)", svg)


def test_samples_are_shown_before_and_after(shown: Page, finished: Path) -> None:
    assert shown.count("img") == 2
    for iteration in (0, 60):
        picture = embed(finished / "samples" / f"iteration_{iteration:06d}.png", finished, 2000)
        assert picture is not None and f'src="{picture.uri}"' in shown.raw
    assert "Before training" in shown.text and "After 60 iterations" in shown.text
    assert all(prompt in shown.text for prompt in fake_run.PROMPTS)


def test_every_node_and_edge_of_every_tree_is_drawn(shown: Page, finished: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted((finished / "trees").glob("*.json"))]
    assert len(records) == shown.count("details", "tree") == 3
    drawn = re.findall(r'<svg class="treefig".*?</svg>', shown.raw, flags=re.DOTALL)
    for record, svg in zip(records, drawn, strict=True):
        nodes = {str(node["id"]) for node in record["nodes"]}
        assert sorted(re.findall(r'data-node="(\d+)"', svg)) == sorted(nodes)
        assert sorted(re.findall(r'data-child="(\d+)"', svg)) == sorted(nodes - {"0"})
        left_out = [node for node in record["nodes"][1:] if not node["trained"]]
        assert svg.count('class="edge untrained"') == len(left_out)
        still = {node["depth"] for node in record["nodes"][1:] if not node["stochastic"]}
        assert svg.count('class="still"') == len(still)
        assert svg.count('href="data:image/png') == len(record["leaves"])
        assert svg.count("reward failed</text>") == 1
        node = next(node for node in record["nodes"] if node["depth"] == 4)
        facts = f"node {node['id']}, depth 4\nvalue {number(node['value'])}\nadvantage {signed(node['advantage'])}\n"
        assert facts in svg


def test_the_last_tree_is_open(shown: Page) -> None:
    trees = [attrs for tag, attrs in shown.tags if tag == "details" and attrs.get("class") == "tree"]
    assert ["open" in attrs for attrs in trees] == [False, False, True]


def test_text_of_the_run_is_never_markup(tmp_path: Path) -> None:
    run = fake_run.build_run(tmp_path / "run", iterations=2, prompts=[EVIL] * 3, every=1, labels=['<b>"x"'])
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("digits-branch", "'$style <script>'"))
    evil = page(run)
    assert not {"script", 'b"x"'} & {tag for tag, _ in evil.tags}
    assert escape(EVIL) in evil.raw and "alert(&quot;x&quot;)" in evil.raw
    assert "<h1>$style &lt;script&gt;</h1>" in evil.raw
    assert evil.count("img") == 2 and evil.open == []
    assert "\x00" not in evil.raw
