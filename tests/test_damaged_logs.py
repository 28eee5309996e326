"""Lines of a run's logs that are damaged: named, kept aside, and in nobody's way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from guests import Outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from branchtree.recipe.load import load_recipe
from branchtree.recipe.schema import Recipe, ScoringSection
from branchtree.run.directory import EVALUATION, LOGS, METRICS, RunDirectory
from branchtree.run.logs import lines_until, read_lines
from branchtree.training.alarm import AlarmWatch
from branchtree.training.failures import FailureWatch

WEIGHTS = "final/denoiser.safetensors"
ROWS = {
    "metrics.jsonl": [
        {"iteration": i, "reward/a/mean": 0.5, "reward/a/invalid": 1.0, "leaves/scored": 8.0, "lr": 1e-4}
        for i in range(6)
    ],
    "spread.jsonl": [{"iteration": i, "spread": {"plan": [0.5, 0.25 * i]}} for i in range(6)],
    "alarms.jsonl": [{"iteration": 3, "kind": "diversity", "change": 0.4, "message": "less"}],
    "timing.jsonl": [{"iteration": i, "rollout": 0.1, "total": 0.3} for i in range(6)],
    "evaluation.jsonl": [
        {"iteration": i, "figures": {"a": {"mean": 0.5, "valid": 8, "samples": 8}}, "of": {"prompts": "0123"}}
        for i in range(0, 7, 2)
    ],
    "failures.jsonl": [
        {"iteration": i, "prompt": "a lamp", "leaf": leaf, "reward": "a", "reason": "dark"}
        for i in range(1, 7, 2)
        for leaf in (2, 5)
    ],
}


@cache
def watched() -> Recipe:
    return load_recipe("quickstart", {"alarm.window": 4})


def write(folder: Path) -> dict[str, bytes]:
    contents = {name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in ROWS.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(LOGS), place=st.integers(0, 10**6), byte=st.integers(0, 255), count=st.integers(1, 40))
def test_any_damage_is_read_around(name: str, place: int, byte: int, count: int, tmp_path: Path) -> None:
    """Whatever bytes are written over, resuming keeps the other lines, and nothing raises."""
    for old in tmp_path.iterdir():
        old.unlink()
    whole = write(tmp_path)[name]
    place %= len(whole)
    end = min(place + count, len(whole))
    content = whole[:place] + bytes([byte]) * (end - place) + whole[end:]
    (tmp_path / name).write_bytes(content)
    directory = RunDirectory(tmp_path)
    directory.rewind(4)
    last = 4 if name == EVALUATION else 3
    touched = range(whole[:place].count(b"\n"), whole[:end].count(b"\n") + 1)
    found = directory.rows(name)
    assert all(row["iteration"] <= last for row in found)
    for number, row in enumerate(ROWS[name]):
        assert number in touched or row["iteration"] > last or row in found
    assert all(copy.read_bytes() == content for copy in tmp_path.glob("*.damaged*"))
    AlarmWatch(watched()).recall(directory, None)
    FailureWatch(ScoringSection()).recall(SimpleNamespace(is_main_process=True), directory)


def test_a_line_out_of_order_is_damaged_and_one_after_the_checkpoint_is_only_dropped(tmp_path: Path) -> None:
    lines = [
        '{"iteration": 0}',
        '{"iteration": 7}',
        '{"iteration": 2}',
        '{"iteration": 3}',
        "\0\0\0",
        '{"iteration": 5',
    ]
    (tmp_path / METRICS).write_text("\n".join(lines) + "\n")
    kept, damaged = lines_until(read_lines(tmp_path / METRICS), 2)
    assert [line.number for line in kept] == [1, 3] and [line.number for line in damaged] == [2]
    kept, damaged = lines_until(read_lines(tmp_path / METRICS), 4)
    assert [line.number for line in kept] == [1, 3, 4] and [line.number for line in damaged] == [2, 5, 6]


@pytest.mark.parametrize("damage", ["flipped", "nul", "other tool"])
def test_a_resumed_run_goes_on_without_a_damaged_line(damage: str, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    judged = {"prompts": ["a lamp"], "noises": 2, "every": 3, "rewards": [{"reward": "guest_brightness"}]}
    changes = {"evaluation": judged}
    assert cli(whole, "--no-report", **changes).code == 0
    assert cli(run, "--no-report", run__iterations=3, **changes).code == 0
    before = {}
    written = [name for name in LOGS if (run / name).exists()]
    for name in written:
        lines = (run / name).read_bytes().splitlines(keepends=True)
        line = bytearray(lines[0])
        place = random.Random(5).randrange(2, len(line) - 2)
        if damage == "other tool":
            line = bytearray(b'{"step": 1, "loss": 0.5}\n')
        else:
            line[place if damage == "nul" else 0] = 0 if damage == "nul" else line[0] ^ 0x20
        before[name] = b"".join([bytes(line), *lines[1:]])
        (run / name).write_bytes(before[name])
    (run / "summary.json").write_bytes(b'{"iterations\0": 3}')
    (run / "limits.json").write_bytes(b'{"batch.rollout_rows": Infinity, "\xff": [')
    done = cli(run, "--no-report", "--resume", **changes)
    assert done.code == 0, done.err
    for name in written:
        assert f"{run / name}:1 is damaged and left out" in done.err
        assert (run / f"{name}.damaged").read_bytes() == before[name]
        ours, theirs = ((folder / name).read_bytes().splitlines() for folder in (run, whole))
        if name == "evaluation.jsonl":  # the start policy is judged again
            assert sorted(ours) == sorted(theirs)
        else:
            assert name == "timing.jsonl" or ours == theirs[1:]
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert json.loads((run / "summary.json").read_text())["iterations"] == 6
