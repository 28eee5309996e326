"""Whole training runs under a reward server that fails in every way a server can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from guests import Outcome
from patience import PATIENCE
from tiny_flux import tiny_flux
from training_runs import arguments, metrics, small
from unified_server import Fault, Question, faulty_server

from branchtree import train
from branchtree.errors import RewardError

LEAVES = 8  # of an iteration: two prompts with splits at two steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def served(model: Path, url: str, settings: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A run of three iterations whose reward is the server's; ``settings`` are of the reward."""
    reward = {"reward": "unifiedreward", "server": url, "timeout": PATIENCE, "retries": 0, **(settings or {})}
    return small(model, rewards=[reward], run__iterations=3, **changes)


def some(fault: Fault, often: int = 4) -> Callable[[Question], Fault]:
    """Every so many questions meet a fault, whatever the order that they arrive in."""
    return lambda question: fault if question.place % often == 0 else "fine"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "answered 500"),
        ("slow", "no answer from"),
        ("dies", "no answer from"),
        ("malformed", "JSON"),
        ("truncated", "cut off"),
        ("nan", "nan"),
        ("ten", "10"),
    ],
)
def test_leaves_that_meet_a_fault_are_masked_and_the_run_goes_on(
    fault: Fault, reason: str, model: Path, tmp_path: Path
) -> None:
    with faulty_server(some(fault), delay=PATIENCE) as server:
        # Answers that are fine come in time on a busy machine too.
        settings = {"timeout": 10.0, "wait": PATIENCE} if fault == "slow" else {}
        train("quickstart", {**served(model, server.url, settings), "run.iterations": 1}, output=tmp_path / "run")
        shown = {question.place: 1 + 4 * question.brightness for question in server.questions}
    row = metrics(tmp_path / "run")[0]
    assert len(shown) == LEAVES
    assert row["reward/unifiedreward/invalid"] == LEAVES / 4
    assert row["reward/valid_fraction"] == 0.75
    answered = [score for place, score in shown.items() if place % 4]
    # The mean of what was said, to four decimals, and of nothing else.
    assert row["reward/unifiedreward/mean"] == pytest.approx(sum(answered) / len(answered), abs=1e-4)
    # The same faults, with no failure allowed: the message tells the reason.
    settings = {"timeout": 0.5, "wait": PATIENCE} if fault == "slow" else {}
    with faulty_server(some(fault), delay=PATIENCE) as server, pytest.raises(RewardError) as told:
        train("quickstart", served(model, server.url, settings, scoring__max_invalid=0), output=tmp_path / "strict")
    lost = r"\d" if fault == "slow" else "2"
    assert re.search(f"gave no valid value for {lost} of 8 samples", str(told.value))
    assert reason in str(told.value)


def test_a_server_that_is_not_there_ends_the_run_before_it_begins(
    model: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    with faulty_server() as server:
        url = server.url
    output = tmp_path / "run"
    done = command("train", "quickstart", *arguments(served(model, url)), "--output", str(output))
    assert done.code == 2
    assert done.err.startswith("error: reward 'unifiedreward' cannot be loaded: ")
    assert url in done.err and "Traceback" not in done.err
    assert not output.exists()


def gone_from(question: int) -> Callable[[Question], Fault]:
    return lambda asked: "fine" if asked.place < question else "dies"


def test_a_server_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(
    model: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    """It answers one iteration and half of the second: 4 of 8, then 12 of 16 in a window of two are lost."""
    output = tmp_path / "run"
    with faulty_server(gone_from(LEAVES + LEAVES // 2)) as server:
        port = server.port
        overrides = served(model, server.url, scoring__window=2, run__checkpoint_every=100)
        words = ("train", "quickstart", *arguments(overrides), "--output", str(output), "--no-report")
        done = command(*words)
    assert done.code == 2
    assert "reward 'unifiedreward' gave no valid value for 12 of 16 samples of the last 2 iterations" in done.err
    assert "no answer from" in done.err and "--resume" in done.err
    assert [row["reward/unifiedreward/invalid"] for row in metrics(output)] == [0, 4]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["iteration_000002"]
    with faulty_server(port=port):
        again = command(*words, "--resume")
    assert again.code == 0, again.err
    assert [row["reward/unifiedreward/invalid"] for row in metrics(output)] == [0, 4, 0]
    assert json.loads((output / "summary.json").read_text())["iterations"] == 3


def test_a_run_may_be_told_to_bear_the_loss_of_its_server(model: Path, tmp_path: Path) -> None:
    with faulty_server(gone_from(LEAVES)) as server:
        train("quickstart", served(model, server.url, scoring__max_invalid=1), output=tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["reward/skipped_prompts"] for row in rows] == [0, 2, 2]
    assert [row["steps/taken"] for row in rows] == [1, 0, 0]
    assert ["reward/unifiedreward/mean" in row for row in rows] == [True, False, False]
