"""The log of samples that could not be scored: which are named, which only counted, and how the report shows them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_run
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_plan

from branchtree.core.scores import Scores
from branchtree.core.sharing import cut
from branchtree.core.tree import grow, grow_shares
from branchtree.errors import RewardError
from branchtree.files.json_lines import json_object
from branchtree.plugins import Condition
from branchtree.recipe.schema import ScoringSection
from branchtree.report.read import read_run
from branchtree.report.sections import failures
from branchtree.training.failures import (
    LISTED,
    OTHER_REASONS,
    REASONS,
    FailureRow,
    FailureWatch,
    Leaves,
    count_failures,
    log_rows,
)

PLANS = [make_plan(2, {0: count}) for count in (4, 7, 30)]
CONDITIONS = [Condition(f"prompt {number}", location=f"p.txt:{number}") for number in range(3)]
IDS = [12, 10, 11]


def scored(leaves: list[tuple[int, int]], bad: dict[tuple[int, int], str]) -> Scores:
    valid = torch.tensor([leaf not in bad for leaf in leaves])
    reasons = {row: bad[leaf] for row, leaf in enumerate(leaves) if bad.get(leaf)}
    return Scores(torch.zeros(len(leaves)), valid, reasons=reasons)


def share(prompts: range, member: int, members: int, bad: dict[str, dict[tuple[int, int], str]]) -> tuple[Any, Any]:
    """What a process with a part of some prompts' leaves gives: its counts, and the leaves that it lists."""
    parts = [cut(PLANS[prompt], members)[member] for prompt in prompts]
    leaves = [(prompt, leaf) for prompt, part in zip(prompts, parts, strict=True) for leaf in part.leaves]
    scores = {label: scored(leaves, found) for label, found in bad.items()}
    ids, conditions = [IDS[i] for i in prompts], [CONDITIONS[i] for i in prompts]
    return count_failures(scores), Leaves(grow_shares(parts), ids, conditions, prompts.start).failed(scores)


def logged(shares: list[tuple[Any, Any]]) -> list[FailureRow]:
    return log_rows([counts for counts, _ in shares], [listed for _, listed in shares])


LEAVES = [(prompt, leaf) for prompt, plan in enumerate(PLANS) for leaf in range(plan.leaves)]
BAD = st.dictionaries(st.sampled_from(LEAVES), st.sampled_from(["", "dark", "blank"]), max_size=len(LEAVES))


@settings(deadline=None, max_examples=40)
@given(bad=st.fixed_dictionaries({"a": BAD, "b": BAD}))
def test_processes_log_together_what_one_would(bad: dict[str, dict[tuple[int, int], str]]) -> None:
    alone = logged([share(range(3), 0, 1, bad)])
    apart = logged([share(range(2), 0, 1, bad), share(range(2, 3), 0, 1, bad)])
    teams = logged([share(range(3), member, 3, bad) for member in range(3)])

    def plain(rows: list[FailureRow]) -> list[str]:
        return sorted(json.dumps(row, sort_keys=True) for row in rows)

    assert plain(alone) == plain(apart) == plain(teams)
    named = [row for row in alone if "leaf" in row]
    failed = [(prompt, leaf, label) for label, found in bad.items() for prompt, leaf in found]
    assert len(named) == min(len(failed), LISTED) and len(named) + sum(row.get("more", 0) for row in alone) == len(
        failed
    )
    for row in named:
        prompt = IDS.index(row["prompt_id"])
        assert row["prompt"] == f"prompt {prompt}" and row["source"] == f"p.txt:{prompt}"
        assert row["reason"] == (bad[row["reward"]][prompt, row["leaf"]] or "the reward gave none")
    assert all(sum(row["reasons"].values()) == row["more"] for row in alone if "more" in row)


def test_a_flood_of_failures_stays_short_and_is_counted() -> None:
    plan = make_plan(2, {0: 2000})
    reasons = {row: f"no {row % 400} \ud800" + "x" * 5000 for row in range(2000)}
    scores = {"a": Scores(torch.zeros(2000), torch.zeros(2000, dtype=torch.bool), reasons=reasons)}
    leaves = Leaves(grow([plan]), [5], [Condition("p" * 10_000)], 0)
    lines: list[FailureRow] = []
    watch = FailureWatch(ScoringSection(max_invalid=0.5, window=1))
    with pytest.raises(RewardError, match="2000 of 2000"):
        watch.check(SimpleNamespace(is_main_process=True), scores, leaves, lines.append)
    assert len(lines) == LISTED + 1 and lines[-1]["more"] == 2000 - LISTED  # written before the run ends
    assert len(lines[-1]["reasons"]) == REASONS + 1 and OTHER_REASONS in lines[-1]["reasons"]
    text = "\n".join(json.dumps(line) for line in lines)
    assert len(text) < 40_000 and all(json_object(line, "here") for line in text.split("\n"))
    quiet: list[FailureRow] = []
    FailureWatch(ScoringSection(max_invalid=1)).check(
        SimpleNamespace(is_main_process=False), scores, leaves, quiet.append
    )
    assert not quiet


def test_the_report_counts_reasons_and_shows_examples(tmp_path: Path) -> None:
    run = fake_run.build_run(tmp_path / "run", 4, every=2)
    assert failures(read_run(run)) == ""
    sample = {"prompt_id": 3, "prompt": "<b>a cat</b>", "leaf": 7, "reward": "hps", "reason": "it is dark"}
    rows: list[dict[str, Any]] = [{"iteration": i, **sample} for i in range(3)]
    rows.append({"iteration": 2, "reward": "hps", "more": 40, "reasons": {"it is dark": 38, "blank": 2}})
    rows.append({"iteration": 3, "reason": "reward 'hps' failed: OSError: gone"})
    fake_run.write_lines(run / "failures.jsonl", rows)
    with (run / "failures.jsonl").open("a") as file:
        file.write('{"iteration": 3, "leaf": "x"}\n{"iteration": 3, "le')
    found = read_run(run)
    page = failures(found)
    assert "&lt;b&gt;a cat&lt;/b&gt;" in page and "The last 3 that are named" in page
    gone = "reward &#x27;hps&#x27; failed: OSError: gone"
    for reward, *cells in (("hps", "it is dark", 41, 2), ("hps", "blank", 2, 2), ("the whole call", gone, 1, 3)):
        assert f'<th scope="row">{reward}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert any("A line of iteration 3 in failures.jsonl was left out" in note for note in found.notes)
    assert any("unreadable lines of failures.jsonl" in note or "is incomplete" in note for note in found.notes)
