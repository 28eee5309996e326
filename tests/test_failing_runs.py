"""Runs that fail once an iteration is done: what was learnt is saved, and the resumed run is one that did not fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from guests import Outcome
from mishaps import SETTINGS, same_end, told
from tiny_flux import tiny_flux
from training_runs import small

from branchtree import load_recipe, train
from branchtree.errors import BranchTreeError, TrackerError
from branchtree.run.checkpoint import list_checkpoints, read_state
from branchtree.run.directory import RunDirectory
from branchtree.run.manifest import require_whole
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.trainer import Trainer

JUDGED = {"prompts": ["a bright lamp"], "noises": 2, "every": 2, "rewards": [{"reward": "brittle"}]}
AT_1: dict[str, Any] = {"callback": "mishap", "at": 1}
CHANGES = {"model__adapter": "fragile", "run__checkpoint_every": 100, "run__iterations": 4, "evaluation": JUDGED}
TRAINED_ON = {"rewards__0__reward": "brittle", "evaluation": None}

FAILING: dict[str, tuple[dict[str, Any], dict[str, Any], str, int]] = {
    # what happens at the end of the second iteration; what else is changed; the message; iterations that are kept
    "held-out reward": (
        {"fail": "reward"},
        {},
        "reward 'brittle' failed: ConnectionError: the judge does not answer",
        2,
    ),
    "reward": ({"fail": "reward"}, TRAINED_ON, "reward 'brittle' failed: ConnectionError: the judge", 2),
    "out of memory": ({"fail": "memory"}, {}, "evaluation.rows: memory ran out with one row at a time", 2),
    "trees": ({"block": "trees/iteration_000002"}, {"run__tree_every": 2}, "/trees: cannot be written: ", 3),
    "samples": (
        {"block": "samples/iteration_000003.png/x"},
        {"run__sample_every": 3},
        "/samples: cannot be written: ",
        3,
    ),
    "callback": ({"error": "no such figure"}, {}, "the callback mishaps_plugin.Mishap failed in on_iteration: Val", 2),
    "callback at an evaluation": (
        {"error": "no such figure", "hook": "on_evaluation"},
        {"evaluation": {**JUDGED, "every": 100}, "run__checkpoint_every": 1},
        "the callback mishaps_plugin.Mishap failed in on_evaluation: ValueError: no such figure",
        0,
    ),
    "callback at the end": (
        {"error": "no such figure", "hook": "on_end"},
        {},
        "the callback mishaps_plugin.Mishap failed in on_end: ValueError: no such figure. The checkpoint ",
        4,
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_whatever_fails_leaves_a_checkpoint_of_the_last_iteration(
    case: str, cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mishap, further, expected, kept = FAILING[case]
    changes, run = {**CHANGES, **further}, tmp_path / "run"
    monkeypatch.setenv("FAIL", "")
    message = told(cli(run, "--no-report", **changes, callbacks=[{**AT_1, **mishap}]))
    assert expected in message
    monkeypatch.setenv("FAIL", "")
    if not kept:
        assert not run.exists()
        return
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-1:] == [f"iteration_{kept:06d}"]
    require_whole(run / f"checkpoints/iteration_{kept:06d}")
    if "block" in mishap:
        (run / mishap["block"]).unlink()
        with suppress(OSError):
            (run / mishap["block"]).parent.rmdir()
    assert cli(tmp_path / "whole", "--no-report", **changes).code == 0
    assert cli(run, "--no-report", "--resume", **changes).code == 0
    logs = ("evaluation.jsonl",) if changes["evaluation"] else ()
    assert same_end(run, tmp_path / "whole", *logs, "samples/iteration_000004.json")


def test_the_last_evaluation_may_fail_and_the_model_is_there(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "")
    run, changes = tmp_path / "run", {**CHANGES, "run__iterations": 2}
    assert cli(tmp_path / "whole", "--no-report", **changes).code == 0
    message = told(cli(run, "--no-report", **changes, callbacks=[{**AT_1, "fail": "reward"}]))
    assert message == "reward 'brittle' failed: ConnectionError: the judge does not answer"
    assert same_end(run, tmp_path / "whole")
    assert not (run / "summary.json").exists()
    monkeypatch.setenv("FAIL", "")
    assert cli(run, "--no-report", "--resume", **changes).code == 0
    assert same_end(run, tmp_path / "whole", "evaluation.jsonl", "samples/iteration_000002.png")
    assert (run / "summary.json").exists()


@pytest.fixture
def trained(
    guest_site: Path, mishap_site: Path, plug: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """``train`` of the recipe ``guest``, for what ends with a traceback."""
    plug(guest_site)
    plug(mishap_site)
    monkeypatch.setenv("FAIL", "")
    return lambda output, changes, resume=False: train(
        "guest", {**SETTINGS, "callbacks": [], "model.adapter": "fragile", **changes}, output=output, resume=resume
    )


@pytest.mark.parametrize("case", ["decoder", "tracker"])
def test_so_does_an_exception_that_nobody_foresaw(
    case: str, trained: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that breaks at the samples of iteration 3, and a tracker that breaks in the fourth iteration."""
    changes: dict[str, Any] = {"run.checkpoint_every": 100, "run.sample_every": 3}
    trained(tmp_path / "whole", changes)
    failing: dict[str, Any] = {"callbacks": [{"callback": "mishap", "at": 2, "fail": "decoder"}]}
    kept = 3
    if case == "tracker":
        failing, kept, log = {"run.trackers": ["tensorboard"]}, 4, accelerate.tracking.TensorBoardTracker.log

        def broken(self: Any, values: Any, step: int, **further: Any) -> None:
            assert step < 3, "the tracker broke"
            log(self, values, step, **further)

        monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "log", broken)
    with pytest.raises(ZeroDivisionError if case == "decoder" else TrackerError, match="broke"):
        trained(tmp_path / "run", {**changes, **failing})
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == [f"iteration_{kept:06d}"]
    monkeypatch.setenv("FAIL", "")
    trained(tmp_path / "run", changes, resume=True)
    assert same_end(tmp_path / "run", tmp_path / "whole", "samples/iteration_000003.png")


def test_refused_updates_leave_a_checkpoint_as_it_was_before_them(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """Its count of updates refused in a row is that of the iterations that are done."""
    run, never = tmp_path / "run", {"optim__refuse_above": 1e-30, "optim__max_refused": 2, "run__checkpoint_every": 100}
    assert "iteration 2: the gradient's norm" in told(cli(run, "--no-report", **never))
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    state = read_state(checkpoint)
    assert (state["iteration"], state["refused_in_a_row"]) == (2, 2)
    assert "iteration 2: the gradient's norm" in told(cli(run, "--no-report", "--resume", **never))


def test_half_an_iteration_is_not_saved(tmp_path: Path) -> None:
    """Two steps an iteration; in the second iteration the first step is taken, and the second fails."""
    model = tiny_flux(tmp_path / "flux")
    recipe = load_recipe("quickstart", small(model, optim__steps_per_iteration=2, run__checkpoint_every=100))
    output = RunDirectory(tmp_path / "run")
    output.claim(resume=False)
    session = open_session(read_inputs(recipe), output, make_accelerator(recipe))
    step, steps = session.updater.engine.optimizer.step, list[int]()

    def failing(*arguments: Any, **further: Any) -> Any:
        steps.append(len(steps))
        assert len(steps) < 4, "no step"
        return step(*arguments, **further)

    session.updater.engine.optimizer.step = failing
    with pytest.raises(AssertionError, match="no step"):
        Trainer(session, []).run(resume=False)
    assert len(steps) == 4 and not list_checkpoints(output.checkpoints)


# --- weights that diverge ---


@pytest.mark.parametrize("every", [1, 100], ids=["found before a checkpoint", "found by its samples"])
@pytest.mark.parametrize("rate", [1e5, 1e6])
def test_diverged_weights_are_called_so_and_the_good_checkpoint_is_kept(
    rate: float, every: int, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli(tmp_path / "whole", "--no-report").code == 0
    assert cli(run, "--no-report", run__iterations=3, run__keep_checkpoints=1).code == 0
    changes = {"optim__lr": rate, "run__checkpoint_every": every, "run__keep_checkpoints": 1}
    message = told(cli(run, "--no-report", "--resume", "--allow", "optim.lr", **changes))
    assert "the weights have diverged in iteration " in message
    assert f"The last good checkpoint {run}/checkpoints/iteration_000003 is kept: with a lower optim.lr" in message
    assert "reward" not in message.lower()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["iteration_000003"]
    if every == 1:
        assert "in iteration 3: they make samples" in message
    assert cli(run, "--no-report", "--resume").code == 0
    assert same_end(run, tmp_path / "whole")


def test_weights_that_diverge_at_once_leave_nothing_to_go_on_from(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    message = told(cli(tmp_path / "run", "--no-report", optim__lr=1e6))
    assert "the weights have diverged in iteration 0: " in message and "No checkpoint was written before" in message
    assert cli(tmp_path / "run", "--no-report", "--resume", run__iterations=1).code == 0


def test_rewards_of_a_diverged_policy_are_not_blamed(
    cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that raises over pictures that are not finite is a symptom, and one that raises by itself is not."""
    monkeypatch.setenv("FAIL", "")
    changes = {"rewards__0__reward": "brittle", "run__checkpoint_every": 100}
    failing = [{"callback": "mishap", "at": 0, "fail": "reward"}]
    message = told(cli(tmp_path / "run", "--no-report", **changes, callbacks=failing, optim__lr=1e6))
    assert "the weights have diverged in iteration 0" in message and "brittle" not in message
    monkeypatch.setenv("FAIL", "")
    assert told(cli(tmp_path / "other", "--no-report", **changes, callbacks=failing)).startswith("reward 'brittle'")


def test_a_gradient_that_is_not_finite_is_no_matter_of_rewards() -> None:
    from branchtree.recipe.schema import OptimSection
    from branchtree.training.update import UpdateGuard

    with pytest.raises(BranchTreeError) as caught:
        UpdateGuard(OptimSection(max_refused=0)).admits(float("nan"), 3)
    assert "iteration 3: the gradient is not finite" in str(caught.value) and "reward" not in str(caught.value)
