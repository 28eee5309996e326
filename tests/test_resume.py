"""What a continued run compares, which files it must find as they were, and from which checkpoint it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from branchtree import train
from branchtree.errors import CheckpointError, RecipeError
from branchtree.plugins import Condition
from branchtree.recipe import Recipe, load_recipe
from branchtree.run.contents import (
    BLOCK,
    MEDIA_WHOLE,
    WEIGHTS_WHOLE,
    changed_files,
    evaluation_identity,
    file_digest,
    read_contents,
    same_files,
)
from branchtree.run.resume import as_of_now

SMALL: dict[str, Any] = {
    "run.iterations": 2,
    "run.checkpoint_every": 1,
    "run.sample_every": 100,
    "run.sample_prompts": 1,
    "run.tree_every": 100,
    "tree.steps": 4,
    "tree.splits": [0],
    "callbacks": [],
}


@pytest.fixture
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)


def rows(run: Path, name: str = "evaluation.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def longer(run: Path, iterations: int = 4, **changes: Any) -> Any:
    return train("guest", {**SMALL, "run.iterations": iterations, **changes}, output=run, resume=True)


# --- held-out figures ---


def test_other_rewards_are_compared_with_the_base_model_under_the_same_rewards(guest: None, tmp_path: Path) -> None:
    """A KeyError once: the figures before had other labels."""
    first = train("guest", SMALL, output=tmp_path / "run")
    assert first.before and first.after and first.before.keys() == {"guest_brightness"}
    dark = [{"reward": "guest_brightness", "label": "dark", "target": 0.0}]
    second = longer(tmp_path / "run", **{"evaluation.rewards": dark})
    assert second.before and second.after
    assert second.before.keys() == second.after.keys() == {"dark"}
    alone = train("guest", {**SMALL, "evaluation.rewards": dark}, output=tmp_path / "alone")
    assert second.before == alone.before  # that of the base model, not of the checkpoint
    assert second.before["dark"] != first.before["guest_brightness"]


def test_other_prompts_and_settings_under_one_label_make_another_set(guest: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train("guest", SMALL, output=run)
    changes: list[dict[str, Any]] = [
        {"evaluation.prompts": ["a dark night"]},
        {"evaluation.noises": 2},
        {"evaluation.seed": 8},
        {"evaluation.limit": 1},
        {"evaluation.rewards": [{"reward": "guest_brightness", "target": 0.5}]},
    ]
    for number, change in enumerate(changes):
        result = longer(run, 3 + number, **change)
        assert result.before and result.after, change
        assert result.before != first.before
        assert result.before["guest_brightness"].samples == result.after["guest_brightness"].samples
    identities = [json.dumps(row["identity"], sort_keys=True) for row in rows(run)]
    assert len(set(identities)) == 1 + len(changes)
    again = longer(run, 2 + len(changes), **changes[-1])
    assert (again.before, again.after) == (result.before, result.after)
    assert len(rows(run)) == len(identities)  # nothing is evaluated twice
    from branchtree.report.read import read_run

    shown = read_run(run)
    assert [entry.figures["guest_brightness"].mean for entry in shown.evaluations] == [
        result.before["guest_brightness"].mean,
        result.after["guest_brightness"].mean,
    ]
    assert "lines of evaluation.jsonl are of other prompts or rewards" in " ".join(shown.notes)


def test_a_finished_run_under_other_prompts_has_both_figures_and_the_command_shows_them(
    guest: None, tmp_path: Path, command: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    train("guest", SMALL, output=run)
    words = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    words.append('evaluation.prompts=["a dark night"]')
    done = command("train", "guest", *words, "--output", str(run), "--resume", "--no-report")
    assert done.code == 0, done.err
    base, trained = rows(run)[-2:]
    assert (base["iteration"], trained["iteration"]) == (0, 2) and base["identity"] == trained["identity"]
    for row in (base, trained):
        assert f"{row['figures']['guest_brightness']['mean']:.4f}" in done.out
    assert "evaluating the start policy" in " ".join(done.err.split())


def test_a_resume_of_the_same_run_evaluates_nothing_again(guest: None, tmp_path: Path) -> None:
    train("guest", {**SMALL, "run.iterations": 4}, output=tmp_path / "whole")
    train("guest", SMALL, output=tmp_path / "run")
    longer(tmp_path / "run", **{"evaluation.every": 2})
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [0, 2, 4]
    assert rows(tmp_path / "run")[::2] == rows(tmp_path / "whole")


def test_rows_of_a_comparison_that_were_judged_unlike_do_not_count(guest: None, tmp_path: Path) -> None:
    from branchtree.studies.compare.plan import plan_runs
    from branchtree.studies.compare.request import ComparisonRequest, Row
    from branchtree.studies.compare.results import collect_results

    held = tmp_path / "held.txt"
    held.write_text("a bright lamp\n")
    shared = {key: value for key, value in SMALL.items() if key != "run.iterations"}
    request = ComparisonRequest(
        (Row("one", "guest"), Row("two", "guest")), (0,), shared={**shared, "evaluation.prompts": str(held)}
    )
    plans = plan_runs(request, tmp_path / "out")
    short = [
        run.recipe.model_copy(update={"run": run.recipe.run.model_copy(update={"iterations": 20})})
        for run in plans.runs
    ]
    train(short[0], output=plans.runs[0].folder)
    held.write_text("a dark night\n")
    train(short[1], output=plans.runs[1].folder)
    comparison = collect_results(plans, {})
    assert not comparison.complete
    assert "was judged by other prompts than" in comparison.rows[1].runs[0].message


# --- files ---


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("a lamp\nthe sun\na candle\n")
    return file


def test_other_prompts_in_the_same_file_are_refused_by_name_and_can_be_allowed(
    guest: None, tmp_path: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train("guest", {**SMALL, "data.prompts": str(texts)}, output=run)
    metrics = (run / "metrics.jsonl").read_bytes()
    texts.write_text("a lamp\nthe moon\na candle\n")
    with pytest.raises(CheckpointError) as told:
        longer(run, **{"data.prompts": str(texts)})
    message = str(told.value)
    assert "was written under other files: data.prompts: texts.txt changed. " in message
    assert message.endswith("add --allow data.prompts")
    assert (run / "metrics.jsonl").read_bytes() == metrics
    log = logging.getLogger("branchtree")
    log.propagate = True
    changed = {**SMALL, "run.iterations": 3, "data.prompts": str(texts)}
    assert train("guest", changed, output=run, resume=True, allow=["data.prompts"]).finished
    assert "from iteration 2 on, data.prompts: texts.txt changed" in caplog.text


def test_the_same_prompts_in_another_place_are_no_change(guest: None, tmp_path: Path, texts: Path) -> None:
    train("guest", {**SMALL, "data.prompts": str(texts)}, output=tmp_path / "run")
    moved = tmp_path / "far" / "texts.txt"
    moved.parent.mkdir()
    texts.rename(moved)
    assert longer(tmp_path / "run", 3, **{"data.prompts": str(moved)}).finished


def test_other_weights_in_the_models_folder_are_refused_by_name(guest: None, tmp_path: Path) -> None:
    train("guest", SMALL, output=tmp_path / "base")
    model = tmp_path / "base/final"
    train("guest", {**SMALL, "model.path": str(model)}, output=tmp_path / "run")
    weights = load_file(model / "denoiser.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, model / "denoiser.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other files: model\.path: denoiser\.safetensors changed.*--allow model\.path$"
    ):
        longer(tmp_path / "run", **{"model.path": str(model)})


def test_an_evaluation_warns_of_another_model_than_was_trained(
    guest: None, tmp_path: Path, command: Callable[..., Any]
) -> None:
    train("guest", SMALL, output=tmp_path / "base")
    model = tmp_path / "base/final"
    train("guest", {**SMALL, "model.path": str(model)}, output=tmp_path / "run")
    assert "since then" not in command("evaluate", str(tmp_path / "run")).err
    weights = load_file(model / "denoiser.safetensors")
    save_file({name: value + 1e-3 for name, value in weights.items()}, model / "denoiser.safetensors")
    told = command("evaluate", str(tmp_path / "run"))
    assert told.code == 0 and "since then, model.path: denoiser.safetensors changed" in " ".join(told.err.split())


def test_a_checkpoint_without_digests_is_gone_on_from_with_a_warning(
    guest: None, tmp_path: Path, texts: Path, command: Callable[..., Any]
) -> None:
    """One of an earlier version, which also lacks keys that the recipe has by now."""
    from branchtree.run.manifest import write_manifest

    run = tmp_path / "run"
    train("guest", {**SMALL, "data.prompts": str(texts)}, output=run)
    newest = run / "checkpoints/iteration_000002"
    state = json.loads((newest / "state.json").read_text())
    del state["contents"], state["recipe"]["model"]["start"]
    (newest / "state.json").write_text(json.dumps(state))
    write_manifest(newest)
    words = [
        f"{key}={json.dumps(value)}"
        for key, value in {**SMALL, "run.iterations": 3, "data.prompts": str(texts)}.items()
    ]
    done = command("train", "guest", *words, "--output", str(run), "--resume", "--no-report")
    assert done.code == 0, done.err
    assert "holds no digests of files" in done.err


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    return load_recipe("quickstart", {key.replace("__", "."): value for key, value in changes.items()})


def test_every_file_that_prompts_and_plug_ins_name_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"a" * 10)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads/.cache").mkdir()
    for name in ("heads/a.safetensors", "heads/.cache/time", "one.safetensors"):
        (tmp_path / name).write_bytes(b"w")
    chosen = recipe(
        tmp_path,
        data__prompts=str(tmp_path / "p.jsonl"),
        rewards=[{"reward": "hps", "path": str(tmp_path / "heads")}, {"reward": "digits"}],
        evaluation__rewards=[{"reward": "hps", "path": str(tmp_path / "one.safetensors")}],
    )
    seen = [Condition("a", image=tmp_path / "pictures/a.png", metadata={"kind": b"x", "at": {1: [None, 2.5]}})]
    seen[0] = replace(seen[0], further_images=(tmp_path / "pictures/b.png",))
    before = read_contents(chosen, seen, [Condition("b")])
    assert {key: list(files) for key, files in before.items()} == {
        "data.prompts": ["p.jsonl", "pictures/a.png", "pictures/b.png"],
        "evaluation.prompts": ["digits_heldout.txt"],
        "rewards.0.path": ["a.safetensors"],
        "evaluation.rewards.0.path": ["one.safetensors"],
    }
    assert changed_files(before, read_contents(chosen, seen, [Condition("b")])) == []
    (tmp_path / "pictures/a.png").write_bytes(b"a" * 9 + b"b")
    (tmp_path / "heads/b.safetensors").write_bytes(b"w")
    other = [replace(seen[0], metadata={"kind": b"y"})]
    after = read_contents(chosen, other, [Condition("b")])
    assert [str(change) for change in changed_files(before, after)] == [
        "data.prompts: p.jsonl, pictures/a.png changed",
        "rewards.0.path: b.safetensors changed",
    ]
    assert set(same_files(before, after)) == {"evaluation.prompts", "evaluation.folder", "evaluation.rewards.0.path"}
    (tmp_path / "pictures/a.png").unlink()  # a model that takes no picture does not miss it
    assert read_contents(chosen, other, [])["data.prompts"]["pictures/a.png"] == "unreadable"


def test_weights_of_another_model_change_the_digest_of_a_large_file(tmp_path: Path) -> None:
    for size, whole in ((MEDIA_WHOLE + 12345, MEDIA_WHOLE), (WEIGHTS_WHOLE // 8, WEIGHTS_WHOLE)):
        file = tmp_path / str(size)
        content = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        file.write_bytes(content.numpy().tobytes())
        first = file_digest(file, whole)
        for place in (0, BLOCK - 1, size - 1, size - BLOCK):  # both ends always count
            other = content.clone()
            other[place] ^= 1
            file.write_bytes(other.numpy().tobytes())
            assert file_digest(file, whole) != first
        file.write_bytes(content.numpy().tobytes()[:-1])
        assert file_digest(file, whole) != first
        file.write_bytes(content.numpy().tobytes())
        assert file_digest(file, whole) == first  # whatever its time of change


def test_an_earlier_recipe_is_read_with_todays_defaults_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = load_recipe("quickstart", {"data.prompts": "p.txt"}).model_dump(mode="json")
    before = json.loads(json.dumps(now))
    before["data"]["prompts"] = "p.txt"
    del before["model"]["start"], before["optim"]["max_refused"]
    assert as_of_now(before) == now
    before["optim"]["gone"] = 3
    assert as_of_now(before)["optim"]["gone"] == 3


def test_an_identity_is_all_that_figures_depend_on(tmp_path: Path) -> None:
    from branchtree.training.inputs import read_inputs

    def identity(**changes: Any) -> str:
        inputs = read_inputs(recipe(tmp_path, **changes))
        return json.dumps(
            evaluation_identity(inputs.recipe, inputs.held_out, len(inputs.held_out_conditions), inputs.contents)
        )

    first = identity()
    same: list[dict[str, Any]] = [{"optim__lr": 1.0}, {"evaluation__rows": 3}, {"evaluation__every": 2}, {"seed": 3}]
    assert {identity(**change) for change in same} == {first}
    other: list[dict[str, Any]] = [
        {"evaluation__limit": 3},
        {"evaluation__noises": 3},
        {"tree__steps": 19},
        {"sampler__shift": 2.0},
        {"model__guidance": 1.5},
    ]
    assert len({identity(**change) for change in other} | {first}) == 1 + len(other)


# --- a chosen checkpoint ---


def test_a_run_goes_on_from_an_older_checkpoint_and_later_ones_are_set_aside(guest: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keep = {**SMALL, "run.iterations": 4, "run.keep_checkpoints": 9}
    train("guest", keep, output=run)
    whole = (run / "metrics.jsonl").read_bytes()
    last = load_file(run / "checkpoints/iteration_000004/model/denoiser.safetensors")
    assert train("guest", keep, output=run, resume=True, checkpoint=2).iterations == 4
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    done = [f"iteration_00000{n}" for n in (1, 2, 3, 4)]
    assert names == [*done, "later_iteration_000003", "later_iteration_000004"]
    assert (run / "metrics.jsonl").read_bytes() == whole
    for name in ("iteration_000004", "later_iteration_000004"):
        again = load_file(run / "checkpoints" / name / "model/denoiser.safetensors")
        assert all(torch.equal(value, last[key]) for key, value in again.items())
    train("guest", keep, output=run, resume=True, checkpoint=3)
    assert (run / "checkpoints/later_iteration_000004_2").is_dir()  # what was set aside before stays


def test_a_checkpoint_that_is_not_there_and_one_without_resume_are_refused(guest: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train("guest", SMALL, output=run)
    with pytest.raises(CheckpointError, match="run: holds no checkpoint of iteration 7; it has 1, 2"):
        train("guest", SMALL, output=run, resume=True, checkpoint=7)
    with pytest.raises(RecipeError, match="--checkpoint names the one to --resume from"):
        train("guest", SMALL, output=tmp_path / "other", checkpoint=1)
    assert not (tmp_path / "other").exists()
    file = run / "checkpoints/iteration_000001/optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: has \d+ bytes"):
        train("guest", SMALL, output=run, resume=True, checkpoint=1)
