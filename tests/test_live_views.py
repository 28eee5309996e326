"""What shows runs while they train: ``watch``, ``runs`` and the report that is served."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_run
import pytest
from typer.testing import CliRunner

from branchtree.cli.app import app
from branchtree.errors import OutputError
from branchtree.report.live import LiveReport
from branchtree.report.read import read_run
from branchtree.run.lock import LOCK, sole_process, writer


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run that stopped after 23 of 60 iterations."""
    return fake_run.build_run(tmp_path / "run", iterations=23, planned=60)


def shown(*words: str | Path, width: int = 80) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    assert all(len(line) <= width for line in result.output.splitlines())
    return result.output


def test_a_run_is_running_as_long_as_its_process_is(begun: Path) -> None:
    assert (writer(begun), read_run(begun).state) == (None, "stopped")
    with sole_process(begun):
        assert writer(begun) == f"process {os.getpid()} on {os.uname().nodename}"
        assert read_run(begun).state == "running"
    assert read_run(begun).state == "stopped"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (begun / LOCK).write_text(f'{{"pid": {dead.pid}, "host": "{os.uname().nodename}"}}')
    assert read_run(begun).state == "stopped"
    (begun / LOCK).write_text("{")
    assert read_run(begun).state == "stopped"
    assert read_run(fake_run.build_run(begun.parent / "whole")).state == "finished"


@pytest.mark.parametrize("width", [80, 120])
def test_watch_shows_progress_curves_tree_and_alarms(begun: Path, width: int) -> None:
    (begun / "alarms.jsonl").write_text('{"iteration": 12, "message": "accuracy falls"}\n')
    with sole_process(begun):
        text = shown("watch", begun, width=width)
    assert "digits-branch  running, iteration 23 of 60" in text
    assert re.search(
        r"s an iteration \(rollout .*, update .*\); [\d,]+ row equivalents a second; about .* left",
        " ".join(text.split()),
    )
    assert "Alarm after iteration 12: accuracy falls" in text
    run = read_run(begun)
    assert text.count("o digits") == sum(leaf.rewards.get("digits") is not None for leaf in run.trees[-1].leaves)
    chart = text.split("Training reward digits\n")[1].split("\n\n")[0].splitlines()[:6]
    means = [row["reward/digits/mean"] or 0.0 for row in run.metrics]
    assert (float(chart[0].split()[0]), float(chart[-1].split()[0])) == pytest.approx(
        (max(means), min(means)), rel=1e-3
    )
    heights = [sum(" ▁▂▃▄▅▆▇█".index(line[column]) for line in chart) for column in range(9, len(chart[-1]))]
    highest, lowest = (means.index(end(means)) * len(heights) // len(means) for end in (max, min))
    assert heights[highest] == max(heights) == 48
    assert heights[lowest] == min(heights) == 1


def test_watch_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = fake_run.build_run(tmp_path / "run", iterations=1)
    (run / "metrics.jsonl").unlink()
    with sole_process(run):
        assert "its first iteration is not done yet" in shown("watch", run)
    result = CliRunner().invoke(app, ["watch", str(run)])
    assert isinstance(result.exception, OutputError)
    assert "once its first iteration is done" in str(result.exception)


def test_watch_in_a_terminal_ends_with_the_run(begun: Path) -> None:
    above, below = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with sole_process(begun):
        words = [sys.executable, "-m", "branchtree", "watch", str(begun), "--every", "0.2"]
        process = subprocess.Popen(words, stdin=below, stdout=below, stderr=below, env=environment)
        os.close(below)
        seen = os.read(above, 4096)
        while b"iteration 23 of 60" not in seen:
            seen += os.read(above, 4096)
        assert process.poll() is None
    rest = b""
    try:
        while more := os.read(above, 4096):
            rest += more
    except OSError:  # how a pseudo-terminal says that its other end is closed
        pass
    os.close(above)
    assert process.wait() == 0
    assert b"stopped, iteration 23 of 60" in rest


def test_runs_lists_the_newest_first_at_any_depth(begun: Path) -> None:
    other = fake_run.build_run(begun.parent / "compare" / "dense" / "seed_0", iterations=4, planned=4, every=4)
    os.utime(begun / "metrics.jsonl", (1, 1))
    (begun / "alarms.jsonl").write_text('{"iteration": 12, "message": "accuracy falls"}\n')
    rows = shown("runs", begun.parent, width=100).splitlines()
    assert re.match(r" compare/dense/seed_0 +finished +4 of 4 +\S+ -?\d\.\d{4} to -?\d\.\d{4} +- *$", rows[1])
    assert re.match(r" run +stopped +23 of 60 .* 1 *$", next(row for row in rows if row.startswith(" run ")))
    assert read_run(other).state == "finished"
    for folder, message in ((begun / "samples", "holds no run"), (begun / "nowhere", "is no folder")):
        result = CliRunner().invoke(app, ["runs", str(folder)])
        assert isinstance(result.exception, OutputError)
        assert message in str(result.exception)


@pytest.fixture
def served(begun: Path) -> Iterator[LiveReport]:
    with LiveReport(begun, 0) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        yield server
        server.close()
        thread.join()


def test_a_served_report_follows_the_run(begun: Path, served: LiveReport) -> None:
    with urllib.request.urlopen(served.url) as answer:
        assert b"not finished: 23 of 60 iterations" in answer.read()
        assert answer.headers["Refresh"] is None
    with sole_process(begun):
        lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
        (begun / "metrics.jsonl").write_text("".join([*lines, lines[-1].replace('"iteration": 22', '"iteration": 23')]))
        with urllib.request.urlopen(served.url) as answer:
            assert b"running: 24 of 60 iterations" in answer.read()
            assert int(answer.headers["Refresh"]) > 0
    assert not (begun / "report.html").exists()


def test_a_served_report_is_for_this_machine_alone(begun: Path, served: LiveReport) -> None:
    foreign = urllib.request.Request(served.url, headers={"Host": "example.org"})
    for request, status in ((foreign, 403), (served.url + "recipe.yaml", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == status
    port = int(served.url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(OutputError, match=f"cannot listen at port {port}"):
        LiveReport(begun, port)
