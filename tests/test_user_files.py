"""What a user keeps in and around a run's directory: neither success nor failure nor an interruption takes it away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from guests import Outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mishaps import same_end, told

from branchtree import evaluate, train
from branchtree.errors import BranchTreeError, OutputError
from branchtree.files.checksums import MANIFEST
from branchtree.plugins import Callback, Condition
from branchtree.run.ledger import LEDGER, Ledger
from branchtree.training.encodings import EncodingStore

QUICK = {"run.checkpoint_every": 1, "run.keep_checkpoints": 1, "callbacks": [], "run.tree_every": 1}


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plant(folder: Path, *names: str) -> dict[Path, bytes]:
    paths = {name: Path(os.path.normpath(folder / name)) for name in names}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"a user's {name}")
    return {path: path.read_bytes() for path in paths.values()}


# --- a folder of someone else is no place for a run ---

FOREIGN = [
    "samples/photo.txt",
    "final/model.safetensors",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints/iteration_000040/photo.txt",
    ".lock",
    ".writable",
    ".final.partial/photo.txt",
    "deep/er/photo.txt",
]


@pytest.mark.parametrize("flags", [(), ("--resume",)], ids=["new", "resumed"])
def test_a_folder_without_a_run_is_refused_and_left_as_it_is(
    flags: tuple[str, ...], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name in FOREIGN:
        folder = tmp_path / name.replace("/", "_") / "mine"
        before = plant(folder, name)
        for failing in ({}, {"rewards__0__reward": "nowhere"}):
            message = told(cli(folder, "--no-report", *flags, **failing))
            if not failing:
                refused = f"{folder}: is not empty, and holds no run: there is {folder / name}; choose another --output"
                assert message.startswith(f"{folder}: holds no run to resume" if flags else refused)
            assert everything(tmp_path / name.replace("/", "_")) == before
            assert [path.name for path in folder.iterdir()] == [name.split("/")[0]]


def test_an_empty_folder_is_taken_and_given_back(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    failing = {"rewards__0__reward": "brittle", "run__trackers": ["tensorboard"]}
    for run in (tmp_path / "mine", tmp_path / "made" / "up"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FAIL", "reward")
            assert "the judge does not answer" in told(cli(run, "--no-report", **failing))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())
    assert cli(tmp_path / "mine", "--no-report", run__iterations=1).code == 0


@pytest.mark.parametrize("ending", [{"error": "broken"}, {"interrupt": True}])
def test_what_appears_while_a_run_starts_stays_and_the_run_can_start_again(
    ending: dict[str, Any], guest_site: Path, mishap_site: Path, plug: Callable[[Path], None], tmp_path: Path
) -> None:
    plug(guest_site)
    plug(mishap_site)
    run, kept = tmp_path / "run", dict[Path, bytes]()

    class Planter(Callback):
        def on_start(self, output: Path, iteration: int, iterations: int) -> None:
            kept.update(plant(output, "samples/photo.txt", "trackers/photo.txt", "trees/photo.txt", "notes.txt"))
            (output / "samples/iteration_000000.png").write_text("drawn over")  # before there is one of the run's

    changes = {**QUICK, "run.iterations": 1, "run.trackers": ["tensorboard"]}
    mishap = {"callback": "mishap", "at": 0, "hook": "on_evaluation", **ending}
    with pytest.raises((BranchTreeError, KeyboardInterrupt)):
        train("guest", {**changes, "callbacks": [mishap]}, output=run, callbacks=[Planter()])
    left = everything(run)
    assert kept.items() <= left.items()
    assert {path.relative_to(run).as_posix() for path in left.keys() - kept.keys()} == {
        LEDGER,
        "samples/iteration_000000.png",
    }
    assert train("guest", changes, output=run).finished
    assert kept.items() <= everything(run).items()


# --- a run replaces and deletes what it wrote itself ---


def test_a_model_in_final_that_the_run_did_not_write_is_never_replaced(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert cli(whole, "--no-report").code == 0
    assert cli(run, "--no-report", run__iterations=2).code == 0
    # Beside the run's own, in its place, and of its very size.
    for name in ("final/README.md", "final/denoiser.safetensors"):
        changed = run / name
        shutil.copytree(run / "final", tmp_path / "ours")
        changed.write_bytes(changed.read_bytes()[::-1] if changed.exists() else b"a model card")
        before = everything(run)
        message = told(cli(run, "--no-report", "--resume"))
        assert message.startswith(f"{changed}: was not written by this run, or was changed since")
        assert everything(run) == before
        shutil.rmtree(run / "final")
        shutil.move(tmp_path / "ours", run / "final")
    assert cli(run, "--no-report", "--resume").code == 0
    assert same_end(run, whole)


def test_a_final_that_appears_meanwhile_ends_the_run_with_a_checkpoint(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert cli(tmp_path / "whole", "--no-report", run__iterations=3).code == 0
    mishap = {"callback": "mishap", "at": 1, "block": "final/photo.txt"}
    message = told(cli(run, "--no-report", run__iterations=3, callbacks=[mishap]))
    assert message.startswith(f"{run}/final/photo.txt: was not written by this run")
    assert f"The checkpoint {run}/checkpoints/iteration_000003 is kept" in message
    assert (run / "final/photo.txt").read_text() == "in the way"
    shutil.move(run / "final", tmp_path / "elsewhere")
    assert cli(run, "--no-report", "--resume", run__iterations=3).code == 0
    assert same_end(run, tmp_path / "whole")


def test_old_checkpoints_go_by_the_record_and_not_by_their_names(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    run, keeping = tmp_path / "run", {"run__keep_checkpoints": 2}
    assert cli(run, "--no-report", run__iterations=3, **keeping).code == 0
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "iteration_000003", checkpoints / "iteration_000001")  # whole, and a user's copy
    kept = everything(checkpoints / "iteration_000001")
    kept |= plant(run, "checkpoints/iteration_000002/notes.txt", "checkpoints/iteration_2/photo.txt")
    kept |= plant(run, "checkpoints/damaged_iteration_000009/photo.txt", "checkpoints/.iteration_000009.partial/x")
    assert cli(run, "--no-report", "--resume", **keeping).code == 0
    assert kept.items() <= everything(run).items()
    assert {path.name for path in (checkpoints / "iteration_000002").iterdir()} == {MANIFEST, "notes.txt"}
    assert sorted(path.name for path in checkpoints.glob("iteration_00000?")) == [
        "iteration_000001",
        "iteration_000002",
        "iteration_000005",
        "iteration_000006",
    ]
    assert cli(run, "--no-report", "--resume", run__iterations=7, **keeping).code == 0  # what is left is in no way
    assert kept.items() <= everything(run).items()


def test_a_folder_named_like_a_checkpoint_to_come_is_refused(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(run, "--no-report", run__iterations=1).code == 0
    plant(run, "checkpoints/iteration_000040/photo.txt")
    before = everything(run)
    message = told(cli(run, "--no-report", "--resume", run__iterations=2))
    assert message.startswith(f"{run}/checkpoints/iteration_000040: was not written by this run")
    assert everything(run) == before


def test_a_damaged_checkpoint_is_set_aside_beside_an_earlier_one(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(run, "--no-report", run__iterations=3).code == 0
    kept = plant(run, "checkpoints/damaged_iteration_000003/photo.txt")
    (run / "checkpoints/iteration_000003/optimizer.pt").write_bytes(b"half")
    assert cli(run, "--no-report", "--resume", run__iterations=3).code == 0
    assert kept.items() <= everything(run).items()
    assert (run / "checkpoints/damaged_iteration_000003_2/optimizer.pt").read_bytes() == b"half"


def test_a_run_of_an_earlier_version_goes_on(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """It has no record: its whole checkpoints are taken for its own, and ``final/`` for somebody's."""
    run = tmp_path / "run"
    assert cli(run, "--no-report", run__iterations=2, run__keep_checkpoints=2).code == 0
    (run / LEDGER).unlink()
    assert "final" in told(cli(run, "--no-report", "--resume", run__iterations=4, run__keep_checkpoints=2))
    shutil.move(run / "final", tmp_path / "final")
    assert cli(run, "--no-report", "--resume", run__iterations=4, run__keep_checkpoints=2).code == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_000003", "iteration_000004"]


NAMES = st.sampled_from(
    [
        "notes.txt", "final/notes.txt", "samples/photo.txt", "trees/iteration_000000/photo.txt", "trackers/photo.txt",
        "checkpoints/notes.txt", "checkpoints/iteration_000001/notes.txt", "checkpoints/iteration_000002/notes.txt",
        "checkpoints/iteration_000003/notes.txt", "checkpoints/damaged_iteration_000002/notes.txt",
        "checkpoints/.iteration_000002.partial/notes.txt", ".final.before/notes.txt", ".lock", ".writable",
        "evaluation/notes.txt", ".summary.json.partial", "../beside.txt", "../run2/final/notes.txt",
    ]
)  # fmt: skip


class PowerCutError(BaseException):
    pass


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    planted=st.lists(st.tuples(st.sampled_from(["on_start", "on_iteration", "after"]), NAMES), max_size=5),
    ending=st.sampled_from([None, ValueError, KeyboardInterrupt, PowerCutError]),
    at=st.sampled_from(["on_start", "on_iteration", "on_end"]),
)
def test_no_ending_takes_a_user_s_file(
    planted: list[tuple[str, str]],
    ending: type[BaseException] | None,
    at: str,
    guest_site: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Files that appear before, during and after a run, which ends in some way, and is resumed."""
    with pytest.MonkeyPatch.context() as patch:
        from branchtree.plugins.registry import registry

        patch.syspath_prepend(guest_site)
        registry.cache_clear()
        run, kept = tmp_path_factory.mktemp("around") / "run", dict[Path, bytes]()

        class Planter(Callback):
            def __init__(self, ending: type[BaseException] | None) -> None:
                self.ending = ending

            def _happen(self, hook: str) -> None:
                kept.update(plant(run, *(name for when, name in planted if when == hook)))
                if self.ending is not None and at == hook:
                    raise self.ending("the end")

            def on_start(self, output: Path, iteration: int, iterations: int) -> None:
                self._happen("on_start")

            def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
                if iteration == 1:
                    self._happen("on_iteration")

            def on_end(self, output: Path) -> None:
                self._happen("on_end")

        kept.update(plant(run.parent, "beside/final/model.txt", "notes.txt"))
        for iterations, last in ((2, ending), (3, None)):
            resume = (run / "checkpoints").exists()
            changes = {**QUICK, "run.iterations": iterations, "evaluation": None}
            with suppress(BranchTreeError, KeyboardInterrupt, PowerCutError):
                train("guest", changes, output=run, resume=resume, callbacks=[Planter(last)])
            if run.exists():
                kept.update(plant(run, *(name for when, name in planted if when == "after")))
            assert kept.items() <= everything(run.parent).items()
    registry.cache_clear()


# --- what other commands write ---


def test_results_of_other_commands_replace_only_their_own(
    guest_run: tuple[Outcome, Path], guest_site: Path, plug: Callable[[Path], None], tmp_path: Path,
    command: Callable[..., Outcome],
) -> None:  # fmt: skip
    plug(guest_site)
    run = tmp_path / "run"
    shutil.copytree(guest_run[1], run)
    for name in ("samples.jsonl", "grid.png", "evaluation.json"):
        folder = tmp_path / f"mine-{name}"
        before = plant(folder, name, "prompts.txt")
        with pytest.raises(OutputError, match="is in the way, and was not written by this command"):
            evaluate(run, noises=1, output=folder)
        assert everything(folder) == before
    free = tmp_path / "free"
    kept = plant(free, "prompts.txt")
    for _ in range(2):  # the second replaces the first's
        evaluate(run, noises=1, output=free)
        (free / "evaluation.json").unlink()  # as a kill would have it
    assert kept.items() <= everything(free).items()
    for file, words in {
        "diversity.json": ("diversity", str(run), "--output", str(tmp_path / "d")),
        "compare.md": ("compare", "guest", "--output", str(tmp_path / "c")),
        "report.html": ("report", str(run)),
    }.items():
        folder = run if file == "report.html" else tmp_path / file[0]
        (folder / file).unlink(missing_ok=True)
        before = plant(folder, file)
        assert file in told(command(*words))
        assert before.items() <= everything(folder).items()


def test_the_store_of_encodings_evicts_its_own_files_alone(tmp_path: Path) -> None:
    import torch

    kept = plant(tmp_path, "ab/model.safetensors", f"ab/{'0' * 64}.safetensors", "ab/x.txt")
    store = EncodingStore(tmp_path, ["context"], limit=1)
    for prompt in ("a", "b", "c"):
        store.write(Condition(prompt=prompt), {"words": torch.zeros(4)})
    assert kept.items() <= everything(tmp_path).items()
    assert len(everything(tmp_path)) == len(kept)


def test_a_record_that_cannot_be_read_makes_nothing_the_run_s_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open()
    ledger.write_folder(tmp_path / "final", lambda folder: (folder / "model").write_text("x") and None)
    for content in ("", "[1", '{"folders": 3}', json.dumps({"folders": {}, "temporary": ["final", "../x", "/etc"]})):
        (tmp_path / LEDGER).write_text(content)
        again = Ledger(tmp_path)
        again.open()
        with pytest.raises(OutputError, match="was not written by this run"):
            again.require_own(tmp_path / "final")
        assert (tmp_path / "final/model").read_text() == "x"
