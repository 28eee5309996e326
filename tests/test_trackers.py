"""Trackers: no step twice over kills and resumes, files in the run's directory, valid names, one message on failure."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from branchtree import train
from branchtree.errors import RecipeError, TrackerError
from branchtree.plugins import Callback
from branchtree.training.tracking import STATE, Trackers

SMALL: dict[str, Any] = {
    "run.iterations": 6,
    "run.checkpoint_every": 2,
    "run.sample_every": 100,
    "run.sample_prompts": 1,
    "run.tree_every": 100,
    "run.trackers": ["tensorboard"],
    "tree.steps": 4,
    "tree.splits": [0],
    "callbacks": [],
    "evaluation.every": 2,
}
REWARD, HELD_OUT = "reward/guest_brightness/mean", "evaluation/guest_brightness"


@pytest.fixture
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)


class Killed(BaseException):
    """Ends a run as a kill does, without a last checkpoint."""


class KillAfter(Callback):
    def __init__(self, iteration: int) -> None:
        self._last = iteration

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if iteration == self._last:
            raise Killed


def killed(run: Path, iteration: int, **changes: Any) -> None:
    resume = (run / "recipe.yaml").exists()
    with pytest.raises(Killed):
        train("guest", {**SMALL, **changes}, output=run, resume=resume, callbacks=[KillAfter(iteration)])


def logged(run: Path, name: str) -> dict[str, float]:
    return {row["iteration"]: row[name] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def steps(run: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = [path for path in (run / "trackers").iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_killed_and_resumed_run_has_every_step_once_in_tensorboard(guest: None, tmp_path: Path) -> None:
    """It was killed twice beyond its checkpoints, and another learning rate gave other values from then on."""
    run = tmp_path / "run"
    killed(run, 3)  # the checkpoint is of 2 iterations
    abandoned = steps(run, REWARD)
    assert [step for step, _ in abandoned] == [0, 1, 2, 3]
    train("guest", {**SMALL, "optim.lr": 0.5}, output=run, resume=True, allow=["optim.lr"])
    shown, wanted = steps(run, REWARD), logged(run, REWARD)
    assert [step for step, _ in shown] == list(range(6))
    assert [value for _, value in shown] == pytest.approx([wanted[step] for step in range(6)])
    assert shown[3][1] != abandoned[3][1]
    held = steps(run, HELD_OUT)
    assert [step for step, _ in held] == [0, 2, 4, 6]
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    means = [row["figures"]["guest_brightness"]["mean"] for row in rows]
    assert [value for _, value in held] == pytest.approx(means)


class Recorder:
    """A tracker that, as wandb, takes nothing back."""

    name = "recorder"
    requires_logging_directory = False
    sent: list[tuple[int, dict[str, float]]]
    closed = 0
    fails = ""

    def __init__(self, project: str, **settings: Any) -> None:
        self.project = project

    def start(self) -> None:
        if Recorder.fails == "start":
            raise ValueError("no key is\nset up")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        if Recorder.fails == "log" and step == 3:
            raise ConnectionError("gone")
        Recorder.sent.append((step, dict(values)))

    def finish(self) -> None:
        Recorder.closed += 1


@pytest.fixture
def recorder(guest: None, monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    import accelerate.tracking

    monkeypatch.setattr(Recorder, "sent", [], raising=False)
    monkeypatch.setattr(Recorder, "closed", 0)
    monkeypatch.setattr(Recorder, "fails", "")
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard", "recorder"])
    return Recorder


def test_a_tracker_that_takes_nothing_back_is_sent_no_step_twice(recorder: type[Recorder], tmp_path: Path) -> None:
    run = tmp_path / "run"
    mine = {"run.trackers": ["recorder"]}
    killed(run, 3, **mine)
    killed(run, 2, **mine)  # again before it comes as far as the first time
    stopped = json.loads((run / "trackers" / STATE).read_text())
    assert stopped["sent"] == 3
    assert train("guest", {**SMALL, **mine}, output=run, resume=True).finished
    numbers = [step for step, _ in recorder.sent]
    assert numbers == [0, 1, 2, 3, 4, 5, 6]
    seen: defaultdict[str, list[int]] = defaultdict(list)
    for step, values in recorder.sent:
        for name in values:
            seen[name].append(step)
    assert seen[REWARD] == list(range(6)) and seen[HELD_OUT] == [0, 2, 4, 6]
    assert train("guest", {**SMALL, **mine, "run.iterations": 8}, output=run, resume=True).finished
    assert [step for step, _ in recorder.sent] == [*range(7), 7, 8]  # the end of the first run was step 6


def test_a_tracker_that_cannot_start_is_one_message_before_the_model_is_loaded(
    recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from branchtree.training import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    recorder.fails = "start"
    changes = {**SMALL, "run.trackers": ["tensorboard", "recorder"]}
    with pytest.raises(RecipeError) as told:
        train("guest", changes, output=tmp_path / "run")
    assert str(told.value) == (
        "run.trackers: 'recorder' cannot start: ValueError: no key is set up; set it up, or leave it out with "
        "run.trackers=[tensorboard]"
    )
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_to_start_on_resume_leaves_the_run_as_it_was(
    recorder: type[Recorder], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train("guest", {**SMALL, "run.iterations": 2}, output=run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    recorder.fails = "start"
    with pytest.raises(RecipeError, match="'recorder' cannot start"):
        train("guest", {**SMALL, "run.trackers": ["tensorboard", "recorder"]}, output=run, resume=True)
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_tracker_that_fails_later_ends_the_run_with_its_name(recorder: type[Recorder], tmp_path: Path) -> None:
    recorder.fails = "log"
    with pytest.raises(TrackerError, match=r"run\.trackers: 'recorder' failed: ConnectionError: gone\."):
        train("guest", {**SMALL, "run.trackers": ["recorder"]}, output=tmp_path / "run")
    assert recorder.closed == 1
    recorder.fails = ""
    assert train("guest", {**SMALL, "run.trackers": ["recorder"]}, output=tmp_path / "run", resume=True).finished


def test_names_are_made_valid_for_every_tracker(guest: None, tmp_path: Path) -> None:
    run = tmp_path / "a+b: c"
    train("guest", {**SMALL, "run.iterations": 1, "name": "guest+mixgrpo: #1?"}, output=run)
    folders = sorted(path.name for path in (run / "trackers").iterdir())
    assert folders == ["guest-mixgrpo-1", STATE]


def test_without_trackers_nothing_is_kept_and_nothing_written(tmp_path: Path) -> None:
    trackers = Trackers((), tmp_path / "none")
    trackers.evaluation({"a": 1.0})
    trackers.iteration(0, {"b": 2.0})
    trackers.complete(1)
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_one_run_with_its_files_in_the_runs_directory(
    guest: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, dict[str, float]]] = []
    log = wandb.sdk.wandb_run.Run.log

    def spy(self: Any, data: dict[str, float], step: int | None = None, **more: Any) -> None:
        assert step is not None and self.project == "guest-mixgrpo-a-b"
        seen.append((step, data))
        log(self, data, step=step, **more)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", spy)
    run = tmp_path / "my run"
    changes = {"run.trackers": ["wandb"], "name": "guest+mixgrpo: a#b"}
    killed(run, 3, **changes)
    wandb.finish()  # what the end of the process would do
    train("guest", {**SMALL, **changes}, output=run, resume=True)
    assert [step for step, _ in seen] == list(range(7))
    known = json.loads((run / "trackers" / STATE).read_text())["run"]
    folders = sorted(path.name for path in (run / "trackers/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(name.endswith(f"-{known}") for name in folders)
    assert [path.name for path in tmp_path.iterdir()] == ["my run"]
