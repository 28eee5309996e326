"""Checkpoints that are not as they were written: found, named, passed over, and never in the way again."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import Outcome
from tiny_flux import tiny_flux
from training_runs import small

from branchtree import load_recipe, train
from branchtree.errors import CheckpointError, OutputError
from branchtree.run.checkpoint import list_checkpoints, newest_whole
from branchtree.run.ledger import LEDGER
from branchtree.run.manifest import MANIFEST, require_whole, write_manifest
from branchtree.studies.common.subject import find_subject
from branchtree.training.keeper import CheckpointWriter

SETTINGS = {"run.iterations": 6, "run.checkpoint_every": 2, "optim.ema": 0.5, "callbacks": []}
WEIGHTS = "model/denoiser.safetensors"


@pytest.fixture(scope="module")
def whole(guest_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of 2, 4 and 6 iterations."""
    import sys

    from branchtree.plugins.registry import registry

    sys.path.insert(0, str(guest_site))
    registry.cache_clear()
    output = tmp_path_factory.mktemp("runs") / "whole"
    train("guest", SETTINGS, output=output)
    sys.path.remove(str(guest_site))
    registry.cache_clear()
    return output


@pytest.fixture
def run(whole: Path, guest_site: Path, plug: Callable[[Path], None], tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    plug(guest_site)
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def unreadable(path: Path) -> None:
    """A state that is as written, by its manifest, and yet none."""
    path.write_text("{}")
    (path.parent / MANIFEST).unlink()
    write_manifest(path.parent)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped": (WEIGHTS, lambda path: flip(path, 1000), "its content is not what was written (SHA-256 differs)"),
    "truncated": ("optimizer.pt", cut, " bytes, and "),
    "missing": ("average.safetensors", Path.unlink, "is missing"),
    "extra": ("model/notes.txt", lambda path: path.write_text("x"), "was not written with the checkpoint"),
    "no manifest": (MANIFEST, Path.unlink, "is missing"),
    "broken manifest": (MANIFEST, lambda path: flip(path, 0), "manifest.json: not valid JSON"),
    "unreadable state": ("state.json", unreadable, "cannot be read (KeyError: 'recipe')"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(
    damage: str, whole: Path, run: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    name, harm, said = DAMAGES[damage]
    path = run / "checkpoints/iteration_000006" / name
    harm(path)
    words = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    done = command("train", "guest", *words, "--resume", "--output", str(run), "--no-report")
    assert done.code == 0, done.err
    assert f"the checkpoint iteration_000006 is damaged and passed over: {path}: " in done.err and said in done.err
    assert "going on from iteration 4; the damaged checkpoint is now" in done.err
    for file in ("metrics.jsonl", "evaluation.jsonl", f"final/{WEIGHTS.split('/')[1]}"):
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "damaged_iteration_000006", "iteration_000002", "iteration_000004", "iteration_000006",
    ]  # fmt: skip
    for checkpoint in list_checkpoints(run / "checkpoints"):
        require_whole(checkpoint)


def test_a_flip_is_found_wherever_it_is(run: Path) -> None:
    """One byte anywhere, in each file, and every byte of the manifest's first lines."""
    draw, newest = random.Random(5), run / "checkpoints/iteration_000006"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 5
    places = [(path, draw.randrange(path.stat().st_size)) for path in files for _ in range(4)]
    places += [(newest / MANIFEST, place) for place in range(300)]
    for path, place in places:
        flip(path, place)
        with pytest.raises(CheckpointError) as told:
            require_whole(newest)
        assert str(newest) in str(told.value)
        flip(path, place)
    require_whole(newest)


def test_the_manifest_is_what_sha256_says(whole: Path) -> None:
    newest = whole / "checkpoints/iteration_000006"
    files = json.loads((newest / MANIFEST).read_text())["files"]
    assert sorted(files) == ["average.safetensors", WEIGHTS, "optimizer.pt", "state.json"]
    for name, said in files.items():
        content = (newest / name).read_bytes()
        assert said == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_without_a_whole_checkpoint_nothing_goes_on(run: Path, command: Callable[..., Outcome]) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        cut(path / "state.json")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    done = command("train", "guest", *words, "--resume", "--output", str(run))
    assert done.code == 2
    assert "error: " in done.err and "no checkpoint is whole (3 looked at" in done.err.replace("\n", " ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_newest_does_not_push_out_the_whole_one(run: Path) -> None:
    """With one checkpoint to keep and the newest damaged, the next that is written is the one that stays."""
    flip(run / "checkpoints/iteration_000006" / WEIGHTS, 900)
    changes = {**SETTINGS, "run.keep_checkpoints": 1, "run.checkpoint_every": 1, "run.iterations": 5}
    train("guest", changes, output=run, resume=True)
    assert newest_whole(run / "checkpoints") == run / "checkpoints/iteration_000005"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["iteration_000005"]


def test_judging_a_run_takes_a_whole_checkpoint(run: Path) -> None:
    assert find_subject(run).iteration == 6
    flip(run / "checkpoints/iteration_000006" / WEIGHTS, 900)
    assert find_subject(run).iteration == 4
    with pytest.raises(CheckpointError, match=r"denoiser\.safetensors: its content is not what was written"):
        find_subject(run, iteration=6)


def test_leftovers_of_a_kill_are_cleared_away_and_nothing_else_is(run: Path) -> None:
    """What a killed process was filling stands in the record; what is merely called like it does not."""
    left, named_alike = ".iteration_000004.0123abcd.partial", ".iteration_000004.01234567.partial"
    for name in (left, named_alike):
        (run / "checkpoints" / name / "model").mkdir(parents=True)
        (run / "checkpoints" / name / "model" / "weights").write_text("half")
    record = json.loads((run / LEDGER).read_text())
    record["temporary"] += [f"checkpoints/{left}", "../other", "checkpoints/iteration_000004", "/etc"]
    (run / LEDGER).write_text(json.dumps(record))
    train("guest", {**SETTINGS, "run.iterations": 7}, output=run, resume=True)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        named_alike, *(f"iteration_00000{done}" for done in (4, 6, 7)),
    }  # fmt: skip


def test_a_state_says_where_the_run_stands(whole: Path) -> None:
    """Two prompts of four each iteration: the ninth of a shuffled pass of four is the first of the third pass."""
    state = json.loads((whole / "checkpoints/iteration_000004/state.json").read_text())
    assert state["iteration"] == 4 and state["refused_in_a_row"] == 0
    assert state["position"]["prompts_drawn"] == 8
    assert len(set(state["position"]["next_prompts"])) == 2


def test_updates_refused_in_a_row_are_counted_across_a_resumption(run: Path, tmp_path: Path) -> None:
    """Two refused before the stop and one after are three in a row."""
    never = {"optim.refuse_above": 1e-30, "optim.max_refused": 2, "run.checkpoint_every": 1, "callbacks": []}
    train("guest", {**never, "run.iterations": 2}, output=tmp_path / "refusing")
    with pytest.raises(Exception, match=r"iteration 2: .* with it 3 updates in a row were left out"):
        train("guest", {**never, "run.iterations": 3}, output=tmp_path / "refusing", resume=True)


# --- in the background ---


def content(path: Path) -> Any:
    """A file's bytes; of a safetensors file, its header as data, for that library writes it in any order."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


@pytest.mark.parametrize("changes", [{"optim.ema": 0.5}, {"lora.rank": 4}], ids=["whole", "lora"])
def test_in_the_background_the_same_bytes_are_written(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    settings = small(tiny_flux(tmp_path_factory.mktemp("flux")), run__iterations=3, optim__lr=1e-2, **changes)
    found: dict[bool, dict[str, Any]] = {}
    for background in (False, True):
        recipe = load_recipe("quickstart", {**settings, "run.checkpoint_async": background})
        run = tmp_path / str(background)
        train(recipe, output=run)
        files = [path for path in run.rglob("*") if path.is_file() and path.name not in {"timing.jsonl", MANIFEST}]
        files = [
            path
            for path in files
            if path.name not in {"summary.json", "recipe.yaml", "README.md", "state.json", LEDGER}
        ]
        found[background] = {str(path.relative_to(run)): content(path) for path in files}
        state = json.loads((run / "checkpoints/iteration_000002/state.json").read_text())
        assert state["recipe"]["run"].pop("checkpoint_async") is background
        found[background]["state"] = state
    assert found[True] == found[False]
    assert sum("checkpoints" in name for name in found[True]) >= 6


def test_a_write_in_the_background_that_fails_is_told_by_whoever_comes_next() -> None:
    def fail() -> None:
        raise OutputError("no room")

    written: list[int] = []
    for ask in (CheckpointWriter.wait, lambda writer: writer.put(lambda: written.append(1))):
        writer = CheckpointWriter(background=True)
        writer.put(fail)
        with pytest.raises(OutputError, match="no room"):
            ask(writer)
        writer.check()
        writer.put(lambda: written.append(2))
        writer.wait()
    assert written == [2, 2]
    with pytest.raises(OutputError, match="no room"):
        CheckpointWriter(background=False).put(fail)
