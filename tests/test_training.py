"""The training loop end to end, in this process, on a tiny FLUX; branchtree.testing has what holds for any model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from shipped_recipes import ON_GPU, WRITTEN_BY_HAND, require_shipped
from tiny_flux import tiny_flux
from training_runs import largest_difference, metrics, opened, shortened, small, weights

from branchtree import load_recipe, plan, train
from branchtree.errors import BranchTreeError, CheckpointError, OutputError
from branchtree.plugins import Callback
from branchtree.run.directory import RunDirectory
from branchtree.testing.probe import counted_rows
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.trainer import Trainer

AS_SHIPPED = {"flux_t2i_branchgrpo", "wan_quickstart"}
LORA = {"lora.rank": 4, "lora.alpha": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"), guidance_embeds=True)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations that ended."""
    return train("quickstart", small(model), output=tmp_path_factory.mktemp("finished") / "run").output


def run(model: Path, output: Path, **overrides: Any) -> list[dict[str, float]]:
    train("quickstart", small(model, **overrides), output=output)
    return metrics(output)


@pytest.mark.parametrize("name", [name for name in WRITTEN_BY_HAND if name in AS_SHIPPED or name not in ON_GPU])
def test_every_recipe_trains_its_small_version(name: str, tmp_path: Path) -> None:
    """One of each model family with the tree that it ships with; the others are trained by test_gpu_runs.py."""
    changes = {"run.iterations": 1, "evaluation.limit": 1, "evaluation.noises": 1, "run.sample_prompts": 1}
    if name not in AS_SHIPPED:
        changes = {**shortened(name), "evaluation": None}
    result = train(name, changes, smoke=True, output=tmp_path / "run")
    assert result.finished and (result.before is not None) == (name in AS_SHIPPED)
    require_shipped(name, tmp_path / "run", result.before)


def test_later_steps_of_an_iteration_see_the_weights_move(model: Path, tmp_path: Path) -> None:
    rows = run(model, tmp_path / "run", optim__steps_per_iteration=3, optim__lr=1e-3)
    for row in rows:
        assert row["steps/taken"] == 3
        assert row["ratio/first_step_max_deviation"] == 0.0
        assert row["ratio/max_deviation"] > 1e-6
        assert row["rows/rescored"] == 0


def test_recomputed_densities_leave_no_mismatch(model: Path, tmp_path: Path) -> None:
    """With a step so small that no weight changes, every ratio must be 1, though the batches are not the rollout's."""
    tiny = {"optim__lr": 1e-30, "optim__weight_decay": 0.0, "optim__steps_per_iteration": 2}
    rows = run(model, tmp_path / "run", loss__old_log_prob="recomputed", run__precision="bf16", **tiny)
    assert all(row["ratio/max_deviation"] == 0.0 for row in rows)
    assert all(0 < row["rows/rescored"] < row["rows/gradient"] for row in rows)


PRUNINGS = [
    {"pruning.kind": "parent_top1"},
    {"pruning.kind": "extreme", "pruning.count": 3},
    {"pruning.kind": "depth"},
    {"tree.sde": "window"},
    {"credit.advantage": "leaf"},
    {"credit.advantage": "sibling"},
]
ROWS = {"dense": 203, "mixed": 169, "sparse": 135}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [*((preset, {}) for preset in ROWS), *zip([*ROWS] * 2, PRUNINGS, strict=True)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_rows_through_the_denoiser_are_those_of_the_plan(
    model: Path, tmp_path: Path, preset: str, changes: dict[str, Any]
) -> None:
    """Each pruning in one of the trees; test_credit_cost.py counts all in any."""
    overrides = {
        **small(model, tree__steps=20, tree__splits=preset, batch__prompts=1, run__iterations=1),
        **changes,
    }
    planned, session = plan("quickstart", overrides), opened("quickstart", overrides, tmp_path / "run")
    trainer = Trainer(session, [])
    with counted_rows(session.inputs.model.denoiser) as rows:
        trainer._iteration(0)
    assert rows.rollout == planned.rollout_rows == ROWS[preset]
    assert rows.gradient == planned.gradient_rows
    logged = metrics(tmp_path / "run")[0]
    assert (logged["rows/rollout"], logged["rows/gradient"]) == (rows.rollout, rows.gradient)
    assert logged["edges/trained"] == planned.iteration.trained_edges


def test_a_second_run_is_the_same_and_another_seed_another_run(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "a", run__iterations=1)
    assert run(model, tmp_path / "b", run__iterations=1) == first
    assert run(model, tmp_path / "c", run__iterations=1, seed=43) != first


def test_resume_refuses_another_recipe_and_names_what_changed(model: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optim\.lr"):
        train("quickstart", small(model, optim__lr=5e-4), output=tmp_path / "run", resume=True)
    longer = train("quickstart", small(model, run__iterations=3), output=tmp_path / "run", resume=True)
    assert longer.iterations == 3


def test_a_second_run_does_not_overwrite_the_first(model: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="--resume"):
        run(model, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_checkpoints_are_whole_folders_and_the_oldest_go(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", run__iterations=4, run__keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["iteration_000003", "iteration_000004"]
    state = json.loads((tmp_path / "run/checkpoints/iteration_000004/state.json").read_text())
    assert state["iteration"] == 4
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize("lora", [{}, LORA], ids=["full", "lora"])
def test_final_loads_with_diffusers(model: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    train("quickstart", {**small(model, optim__lr=1e-2), **lora}, output=tmp_path / "run")
    final = tmp_path / "run/final"
    pipeline = FluxPipeline.from_pretrained(model if lora else final)
    if lora:
        pipeline.load_lora_weights(final)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": "a seven", "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "pt",
        "max_sequence_length": 8,
    }  # fmt: skip
    trained = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    untrained = FluxPipeline.from_pretrained(model)
    untrained.set_progress_bar_config(disable=True)
    start = untrained(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert trained.shape == start.shape
    assert float((trained - start).abs().max()) > 1e-4


def test_a_strong_kl_term_holds_the_policy_back(model: Path, tmp_path: Path) -> None:
    free = run(model, tmp_path / "free", run__iterations=4, optim__lr=1e-3, loss__kl=1e-9)
    held = run(model, tmp_path / "held", run__iterations=4, optim__lr=1e-3, loss__kl=1e4)
    assert held[-1]["kl"] < 0.5 * free[-1]["kl"]


def test_average_is_what_final_holds(model: Path, tmp_path: Path) -> None:
    """Its decay is 0 at the first step and 2/11 at the second."""
    train("quickstart", small(model, run__iterations=2, optim__ema=0.5, optim__lr=1e-2), output=tmp_path / "averaged")
    for iterations in (1, 2):
        changes = small(model, run__iterations=iterations, optim__lr=1e-2)
        train("quickstart", changes, output=tmp_path / str(iterations))
    averaged, first, second = (weights(tmp_path / name) for name in ("averaged", "1", "2"))
    for name, value in averaged.items():
        assert torch.allclose(value, (2 * first[name] + 9 * second[name]) / 11, atol=1e-6), name


def test_gradient_checkpointing_changes_nothing(model: Path, finished: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "checkpointed", run__gradient_checkpointing=True)
    assert largest_difference(weights(finished), weights(tmp_path / "checkpointed")) < 1e-6


def test_drawn_splits_differ_between_prompts_of_one_batch(model: Path, tmp_path: Path) -> None:
    rows = run(
        model, tmp_path / "run", tree__splits="single", tree__branches=4, tree__sde="splits", tree__steps=12,
        credit__advantage="leaf", batch__prompts=4, tree__siblings="simplex",
    )  # fmt: skip
    assert all(row["rows/gradient"] == 4 and row["edges/trained"] == 16 for row in rows)
    recipe = load_recipe("quickstart", small(model, tree__splits="single", tree__steps=12))
    schedule = read_inputs(recipe).schedule
    assert len({schedule.plan(0, prompt).splits for prompt in range(4)}) > 1


def test_callbacks_follow_the_run(model: Path, tmp_path: Path) -> None:
    class Witness(Callback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_start(self, output: Path, iteration: int, iterations: int) -> None:
            self.seen.append(f"start {iteration}/{iterations}")

        def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
            self.seen.append(f"iteration {iteration}")

        def on_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
            self.seen.append(f"evaluation {iteration} {sorted(figures)}")

        def on_end(self, output: Path) -> None:
            assert (output / "final").is_dir()
            self.seen.append("end")

    evaluation = {"prompts": ["a two"], "noises": 2, "rewards": [{"reward": "digits", "classifier": "heldout"}]}
    witness = Witness()
    result = train("quickstart", small(model, evaluation=evaluation), output=tmp_path / "run", callbacks=[witness])
    expected = ["start 0/2", "evaluation 0 ['digits']", "iteration 0", "iteration 1", "evaluation 2 ['digits']", "end"]
    assert witness.seen == expected
    assert result.before is not None and result.before["digits"].samples == 2


def test_tensorboard_events_are_written(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", run__trackers=["tensorboard"])
    assert list((tmp_path / "run/trackers").rglob("events.out.tfevents.*"))


def test_gradients_that_are_not_finite_end_the_run_before_the_weights_change(model: Path, tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", small(model, optim__max_refused=1))
    inputs = read_inputs(recipe)
    output = RunDirectory(tmp_path / "run")
    output.claim(resume=False)
    session = open_session(inputs, output, make_accelerator(recipe))
    before = {name: value.clone() for name, value in inputs.model.denoiser.state_dict().items()}
    poisoned = next(session.inputs.model.denoiser.parameters())
    poisoned.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(BranchTreeError, match="iteration 1: the gradient is not finite; with it 2 updates in a row"):
        Trainer(session, []).run(resume=False)
    after = inputs.model.denoiser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("ratio", "warnings"), [("plain", 1), ("centred", 0)])
def test_a_clip_range_below_the_mismatch_is_warned_about(
    ratio: str, warnings: int, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """But not where the ratio is not one of densities."""
    # Rows in batches of other sizes differ in their last digits.
    run(model, tmp_path / "run", loss__clip_range=1e-12, batch__rollout_rows=1, loss__ratio=ratio)
    assert sum("loss.clip_range" in message for message in caplog.messages) == warnings
