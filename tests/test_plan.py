"""What a plan says before a run, against the method's own arithmetic and against what a run then does."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from guests import Outcome
from rich.console import Console
from torch import nn

from branchtree import load_recipe, plan, train
from branchtree.cli.display import fits_lines, print_plan
from branchtree.core.cost import Cost
from branchtree.core.schedule import DrawnSplits, FixedSplits, Schedule, SlidingWindow, SplitAtWindow
from branchtree.errors import ModelError, RecipeError
from branchtree.planning.fitting import Fit, find_fits
from branchtree.planning.gpus import GIB, GPUS, Gpu
from branchtree.planning.memory import estimate_memory
from branchtree.planning.plan import RunPlan, draw_tree
from branchtree.planning.preflight import RewardSize, RewardSizes
from branchtree.plugins import DecoderFootprint, Footprint, RewardFootprint
from branchtree.plugins.registry import registry
from branchtree.recipe import Recipe
from branchtree.recipe.build import make_schedule
from branchtree.run.directory import METRICS, RunDirectory

DENSE = {"tree.steps": 20, "tree.splits": "dense", "batch.prompts": 1}


@pytest.fixture(autouse=True)
def _with_the_guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)


def planned(**changes: Any) -> RunPlan:
    """The plan of a 20-step tree of the guest; keys are written with two underscores for a dot."""
    return plan("guest", DENSE | {key.replace("__", "."): value for key, value in changes.items()})


# --- the table of the design ---


@pytest.mark.parametrize(
    ("splits", "nodes", "edges", "rollout", "gradient", "per_leaf"),
    [("dense", 219, 218, 203, 187, 13.68), ("mixed", 185, 184, 169, 153, 11.56), ("sparse", 151, 150, 135, 119, 9.44)],
)
def test_the_papers_trees(splits: str, nodes: int, edges: int, rollout: int, gradient: int, per_leaf: float) -> None:
    cost = planned(tree__splits=splits).iteration
    assert (cost.nodes, cost.edges, cost.leaves) == (nodes, edges, 16)
    assert cost.rollout_rows == rollout
    # Every parent but those of the deterministic last step, which has 16, is trained.
    assert cost.gradient_rows == gradient == rollout - 16
    assert cost.trained_edges == edges - 16
    assert cost.nodes_per_leaf == pytest.approx(per_leaf, abs=0.01)


def test_independent_trajectories_are_a_tree_that_splits_once() -> None:
    cost = planned(tree__splits=[0], tree__branches=16).iteration
    assert (cost.leaves, cost.rollout_rows) == (16, 305)
    assert (cost.gradient_rows, cost.trained_edges) == (1 + 18 * 16, 19 * 16)


@pytest.mark.parametrize(("branches", "leaves"), [(2, 16), (3, 81), (4, 256)])
def test_scaling_in_branches(branches: int, leaves: int) -> None:
    cost = planned(tree__branches=branches).iteration
    widths = [math.prod(branches for split in (0, 3, 6, 9) if split < depth) for depth in range(21)]
    assert (cost.leaves, cost.nodes, cost.rollout_rows) == (leaves, sum(widths), sum(widths[:-1]))


# After the last split, step 9, nine trained steps of 16 edges remain; Parent-Top1 halves them, Extreme-b keeps 2 b.
@pytest.mark.parametrize(
    ("pruning", "rows", "edges"),
    [
        ({"kind": "none"}, 187, 202),
        ({"kind": "parent_top1"}, 187 - 9 * 8, 202 - 9 * 8),
        ({"kind": "extreme", "count": 1}, 187 - 9 * 14, 202 - 9 * 14),
        ({"kind": "extreme", "count": 4}, 187 - 9 * 8, 202 - 9 * 8),
        ({"kind": "extreme", "count": 8}, 187, 202),
        ({"kind": "depth", "size": 4}, 187 - 8 - 3 * 16, 202 - 4 * 16),
        ({"kind": "depth", "size": 1}, 187 - 8, 202 - 16),
    ],
)
def test_pruning_saves_gradient_rows_alone(pruning: dict[str, Any], rows: int, edges: int) -> None:
    cost = planned(pruning=pruning).iteration
    assert (cost.rollout_rows, cost.leaves) == (203, 16)
    assert (cost.gradient_rows, cost.trained_edges) == (rows, edges)


def test_mix_trains_the_splits_and_the_window() -> None:
    cost = planned(tree__sde="window", tree__window={"size": 4, "start": 0}).iteration
    assert cost.rollout_rows == 203
    # Steps 0 to 3 of the window and the splits 6 and 9: their parents, and their children.
    assert cost.gradient_rows == 1 + 2 + 2 + 2 + 4 + 8
    assert cost.trained_edges == 2 + 2 + 2 + 4 + 8 + 16


def test_one_drawn_split_trains_one_row() -> None:
    result = planned(tree__splits="single", tree__branches=16, tree__sde="splits", credit__advantage="leaf")
    (step,) = result.tree.splits
    assert 6 <= step <= 15
    assert result.iteration.rollout_rows == step + 1 + 16 * (19 - step)
    assert (result.iteration.gradient_rows, result.iteration.trained_edges) == (1, 16)


def test_prompts_multiply_the_work() -> None:
    one, three = planned(), planned(batch__prompts=3)
    assert three.per_prompt == one.iteration
    for name in ("nodes", "edges", "leaves", "rollout_rows", "gradient_rows", "trained_edges"):
        assert getattr(three.iteration, name) == 3 * getattr(one.iteration, name)


def test_rows_under_guidance_count_double() -> None:
    one = planned()
    two = replace(one, rows_per_prediction=2)
    assert (one.rollout_rows, one.gradient_rows) == (203, 187)
    assert (two.rollout_rows, two.gradient_rows) == (406, 374)


def test_a_backward_pass_costs_two_forward_passes() -> None:
    forward = planned().footprint.forward_flops_per_row
    assert planned().flops == forward * (203 + 3 * 187)
    assert planned(run__gradient_checkpointing=True).flops == forward * (203 + 4 * 187)
    assert planned(run__gradient_checkpointing=True).rollout_flops == forward * 203


@pytest.mark.parametrize(
    ("recipe", "trained"), [("flux_t2i_branchgrpo", 117.7 / 37.7), ("wan_t2v_motion", 526.9 / 149.5)]
)
def test_frozen_weights_need_no_gradient_of_their_own(recipe: str, trained: float) -> None:
    """Against a trained row's operations over a forward's, under checkpointing, counted on the large models' graphs."""
    size = {"model.height": 400, "model.width": 640, "model.frames": 53} if recipe == "wan_t2v_motion" else {}
    result = plan(recipe, {"lora.rank": 64, "run.gradient_checkpointing": True, **size})
    forward = result.footprint.forward_flops_per_row
    assert result.gradient_flops / result.gradient_rows / forward == pytest.approx(trained, rel=0.01)


def test_a_reference_and_recomputed_densities_cost_forward_passes() -> None:
    forward = planned().footprint.forward_flops_per_row
    assert planned(loss__kl=0.1).gradient_flops == forward * 4 * 187
    recomputed = {"loss__old_log_prob": "recomputed", "optim__steps_per_iteration": 4}
    assert planned(**recomputed).gradient_flops == pytest.approx(forward * 3.75 * 187)


# --- against a run ---


@pytest.mark.parametrize(
    "overrides",
    [
        {"batch.prompts": 3},
        {"pruning.kind": "parent_top1"},
        {"pruning": {"kind": "extreme", "count": 2}},
        {"pruning": {"kind": "depth", "size": 2}},
        {"tree.sde": "window", "tree.window.size": 2, "credit.beta": 0},
        {"tree.splits": "single", "tree.branches": 6, "tree.sde": "splits", "credit.advantage": "leaf"},
        {"tree.branches": [2, 3, 2], "credit.advantage": "sibling", "optim.steps_per_iteration": 2},
    ],
)
def test_a_run_does_what_was_planned(overrides: dict[str, Any], tmp_path: Path) -> None:
    overrides = {"run.iterations": 1, "run.sample_prompts": 1, "evaluation": None, **overrides}
    expected = plan("guest", overrides)
    train("guest", overrides, output=tmp_path / "run")
    (row,) = RunDirectory(tmp_path / "run").rows(METRICS)
    assert row["rows/rollout"] == expected.rollout_rows
    assert row["rows/gradient"] == expected.gradient_rows
    assert row["edges/trained"] == expected.iteration.trained_edges
    assert row["leaves/scored"] == expected.iteration.leaves


def test_a_lora_that_no_layer_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry().model("guest_gaussian")

    class Plain(entry.build):  # type: ignore[misc, name-defined]
        def _lora_targets(self, denoiser: nn.Module) -> list[str]:
            return []

    monkeypatch.setitem(registry().models, "guest_gaussian", replace(entry, build=Plain))
    with pytest.raises(RecipeError, match="lora: no layer of the model family 'guest_gaussian' takes one"):
        plan("guest", {"lora.rank": 4})


def test_every_iteration_of_a_run_keeps_to_the_plan(guest_run: tuple[Outcome, Path]) -> None:
    expected = plan("guest")
    for row in RunDirectory(guest_run[1]).rows(METRICS):
        assert row["rows/rollout"] == expected.rollout_rows
        assert row["rows/gradient"] == expected.gradient_rows


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    (tmp_path / "denoiser.safetensors").write_bytes(b"no weights at all")
    overrides = {"model.path": str(tmp_path)}
    assert plan("guest", overrides).rollout_rows == plan("guest").rollout_rows
    with pytest.raises(ModelError, match="holds no weights of this model"):
        train("guest", overrides, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_plan_fetches_no_dataset() -> None:
    assert planned(data__prompts="hub:branchtree/no-such-set").rollout_rows == 203


def test_a_loaded_recipe_takes_no_overrides() -> None:
    recipe = load_recipe("guest")
    assert plan(recipe).iteration == plan("guest").iteration
    with pytest.raises(TypeError, match="takes neither overrides nor smoke"):
        plan(recipe, {"seed": 1})
    with pytest.raises(TypeError, match="takes neither overrides nor smoke"):
        plan(recipe, smoke=True)


def test_a_plan_refuses_a_sampler_that_does_not_suit_the_model() -> None:
    with pytest.raises(RecipeError, match=r"sampler\.kind: 'ddim' does not suit a model that predicts velocity"):
        planned(sampler__kind="ddim")


# --- schedules ---


def schedule(**tree: Any) -> Schedule:
    return make_schedule(recipe(tree=tree))


def recipe(**sections: Any) -> Recipe:
    fixed = {"name": "r", "model": {"adapter": "x"}, "rewards": [{"reward": "y"}], "data": {"prompts": ["a"]}}
    return Recipe.model_validate(fixed | sections)


def test_the_tree_section_becomes_a_schedule() -> None:
    assert schedule() == Schedule(20, FixedSplits((0, 3, 6, 9), (2, 2, 2, 2)), "all", seed=42)
    assert schedule(steps=5, splits=[0, 3], branches=[2, 4], sde="splits") == Schedule(
        5, FixedSplits((0, 3), (2, 4)), "splits", seed=42
    )
    assert schedule(continuation=4, timestep_fraction=0.5) == Schedule(
        20, FixedSplits((0, 3, 6, 9), (2, 2, 2, 2)), "all", continuation=4, fraction=0.5, seed=42
    )
    window = SlidingWindow(size=3, start=2, every=30, stop=16)
    assert schedule(splits="window", branches=5, sde="window", window={"size": 3, "start": 2}) == Schedule(
        20, SplitAtWindow(window, 5), window, seed=42
    )


@pytest.mark.parametrize(
    ("steps", "draw", "first", "last"),
    [
        (20, {}, 6, 15),
        (10, {}, 3, 7),
        (20, {"first": 0.31, "last": 0.31}, 7, 7),
        (4, {"first": 0.9, "last": 0.95}, 2, 2),
        (2, {}, 0, 0),
    ],
)
def test_drawn_splits_stay_inside_the_grid(steps: int, draw: dict[str, float], first: int, last: int) -> None:
    drawn = schedule(steps=steps, splits="single", branches=16, draw=draw).splits
    assert drawn == DrawnSplits(first, last, 16, seed=42)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, SlidingWindow(4, 0, 30, 15)),
        ({"size": 2, "start": 3, "every": 5, "stop": 9}, SlidingWindow(2, 3, 5, 9)),
        ({"size": 19}, SlidingWindow(19, 0, 30, 0)),
        ({"start": 15}, SlidingWindow(4, 15, 30, 15)),
    ],
)
def test_a_window_stops_where_the_grid_ends(window: dict[str, int], expected: SlidingWindow) -> None:
    assert schedule(sde="window", window=window).sde == expected


@pytest.mark.parametrize("window", [{"size": 20}, {"start": 16}, {"start": 5, "stop": 4}])
def test_a_window_that_does_not_fit_is_refused(window: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="window"):
        schedule(sde="window", window=window)


# --- memory ---

SIZES = Footprint(
    denoiser_parameters=1000,
    frozen_parameters=500,
    latent_shape=(4, 5),
    activation_numbers_per_row=300,
    checkpointed_numbers_per_row=30,
    forward_flops_per_row=1.0,
    rows_per_prediction=2,
    lora_parameters_per_rank=7,
    source="this test",
)
COST = Cost(nodes=11, edges=10, leaves=4, rollout_rows=7, gradient_rows=6, trained_edges=9)


def test_memory_of_full_training() -> None:
    memory = estimate_memory(recipe(), SIZES, COST)
    assert memory.weights == 1000 * 4
    assert memory.optimizer == 1000 * (4 + 8)  # a gradient and two moments in float32
    assert memory.activations == 6 * 2 * 300 * 4  # families, rows per prediction
    assert memory.states == 11 * 20 * 4
    assert (memory.frozen, memory.average) == (500 * 4, 0)
    assert memory.device == 4000 + 12000 + 880 + 14400
    assert memory.host == 2000


def test_memory_under_lora_in_bf16() -> None:
    settings = {
        "run": {"precision": "bf16", "gradient_checkpointing": True},
        "lora": {"rank": 3},
        "optim": {"ema": 0.9},
    }
    memory = estimate_memory(recipe(**settings), SIZES, COST)
    assert memory.weights == 1000 * 2
    assert memory.optimizer == 21 * (4 + 4 + 8)  # the float32 low-rank weights too
    assert memory.activations == 6 * 2 * 30 * 2
    assert (memory.frozen, memory.average) == (500 * 2, 21 * 4)


def test_batches_and_the_host_relieve_the_device() -> None:
    whole = estimate_memory(recipe(), SIZES, COST)
    small = estimate_memory(recipe(batch={"update_rows": 2, "states": "host"}), SIZES, COST)
    assert small.activations == 2 * 2 * 300 * 4
    assert small.device == whole.device - whole.states - whole.activations + small.activations
    assert small.host == whole.host + whole.states
    assert estimate_memory(recipe(batch={"update_rows": 99}), SIZES, COST) == whole


def test_autocast_copies_weights_that_are_trained() -> None:
    memory = estimate_memory(recipe(run={"precision": "bf16"}), SIZES, COST)
    assert memory.weights == 1000 * (4 + 2)
    assert memory.optimizer == 1000 * (4 + 8)


def test_a_kl_term_keeps_the_start_policy_unless_lora_is_on_it() -> None:
    plain, lora = recipe(loss={"kl": 0.1}), recipe(loss={"kl": 0.1}, lora={"rank": 3})
    assert estimate_memory(plain, SIZES, COST).reference == 4000
    assert estimate_memory(lora, SIZES, COST).reference == 0
    assert estimate_memory(plain, SIZES, COST).device == estimate_memory(recipe(), SIZES, COST).device + 4000


def test_the_rollout_counts_where_the_model_knows_it() -> None:
    known = replace(SIZES, forward_numbers_per_row=50, conditioning_numbers=9)
    memory = estimate_memory(recipe(), known, COST)
    assert memory.forward == 4 * 2 * 50 * 4  # as many predictions as leaves, rows per prediction
    assert memory.conditioning == 2 * 9 * 4  # prompts of an iteration
    assert memory.device == estimate_memory(recipe(), SIZES, COST).device + memory.conditioning
    assert estimate_memory(recipe(batch={"rollout_rows": 3}), known, COST).forward == 3 * 2 * 50 * 4
    evaluation = {"prompts": ["a"], "rewards": [{"reward": "y"}], "rows": 100}
    wide = estimate_memory(recipe(evaluation=evaluation), known, COST)
    assert wide.forward == 100 * 2 * 50 * 4
    assert wide.device == wide.resident + wide.forward


def test_frozen_parts_count_where_they_outweigh_the_activations() -> None:
    memory = estimate_memory(recipe(), replace(SIZES, frozen_parameters=10**6), COST)
    assert memory.device == memory.weights + memory.optimizer + memory.states + 4 * 10**6


def test_a_denoiser_leaves_the_device_to_encoders() -> None:
    larger = replace(SIZES, frozen_parameters=10**6)
    beside, alone = (estimate_memory(recipe(run={"encode_alone": alone}), larger, COST) for alone in (False, True))
    assert beside.device - alone.device == alone.host - beside.host == beside.weights == 4000
    small = estimate_memory(recipe(run={"encode_alone": True}), SIZES, COST)
    assert small.device == estimate_memory(recipe(), SIZES, COST).device  # activations are more than the encoders


# --- which GPUs suffice ---


def sized(usable: int) -> Gpu:
    """A GPU of so many usable bytes."""
    gpu = Gpu("g", (usable + 0.5) / 0.92 / GIB)
    assert gpu.usable == usable
    return gpu


def cheapest(usable: int, footprint: Footprint = SIZES, **sections: Any) -> Any:
    (fit,) = find_fits(recipe(**sections), footprint, COST, [sized(usable)])
    return fit.changes


def test_the_known_gpus_rise_and_hold_less_than_their_names_say() -> None:
    sizes = [gpu.memory for gpu in GPUS]
    assert sizes == sorted(sizes)
    for gpu in GPUS:
        (named,) = [int(word.strip("(")) for word in gpu.name.split() if word.startswith("(")]
        assert 0.9 * named < gpu.memory < named
        assert 0.9 * gpu.memory * 2**30 < gpu.usable < 0.95 * gpu.memory * 2**30


CHECKPOINTING = {"run.gradient_checkpointing": True}
ALONE = {"run.encode_alone": True}
LEAST = {"lora.rank": 64, "run.precision": "bf16", **CHECKPOINTING}


# Full training in float32: weights 4000, gradients and moments 12000, states 880, frozen parts 2000 at work, and
# activations of 6 families of 2400, of 240 under checkpointing. In bf16: weights 6000, families of 1200, frozen 1000.
# LoRA of rank 64 trains 448 weights: 4000 + 16 * 448 = 11168, in bf16 2000 + 7168 = 9168.
@pytest.mark.parametrize(
    ("usable", "changes"),
    [
        (31280, {}),
        (31279, {"batch.states": "host"}),
        (30400, {"batch.states": "host"}),
        (30399, {"batch.update_rows": 4}),
        (26480, {"batch.update_rows": 4}),
        (26479, {"batch.update_rows": 2}),
        (19280, {"batch.update_rows": 1}),
        (18400, {"batch.states": "host", "batch.update_rows": 1}),
        (18399, {**CHECKPOINTING, **ALONE}),
        (18320, {**CHECKPOINTING, **ALONE}),
        (18319, {**CHECKPOINTING, "batch.states": "host"}),
        (18000, {**CHECKPOINTING, "batch.states": "host"}),
        (17999, {**CHECKPOINTING, "batch.states": "host", **ALONE}),
        (17440, {**CHECKPOINTING, "batch.states": "host", **ALONE}),
        (17439, {**CHECKPOINTING, "batch.update_rows": 2, **ALONE}),
        (11168 + 2000, {"lora.rank": 64, **CHECKPOINTING, "batch.states": "host"}),
        (11168 + 1999, {"lora.rank": 64, **CHECKPOINTING, "batch.states": "host", **ALONE}),
        (9168 + 1000, {**LEAST, "batch.states": "host"}),
        (9168 + 999, {**LEAST, "batch.states": "host", **ALONE}),
        (9168 + 120, {**LEAST, "batch.states": "host", "batch.update_rows": 1, **ALONE}),
        (9168 + 119, None),
    ],
)  # fmt: skip
def test_the_cheapest_changes_are_found(usable: int, changes: dict[str, Any] | None) -> None:
    assert cheapest(usable) == changes


def test_bf16_is_asked_before_lora_where_either_would_do() -> None:
    heavy = replace(
        SIZES,
        frozen_parameters=0,
        activation_numbers_per_row=10000,
        checkpointed_numbers_per_row=10000,
        lora_parameters_per_rank=1,
    )
    # A family takes 80000, too much beside 16000, in bf16 40000 beside 18000; LoRA leaves 4000 + 16 * 64 beside 80000.
    assert cheapest(86000, heavy) == {"run.precision": "bf16", "batch.update_rows": 1}
    assert cheapest(86000, heavy, run={"precision": "bf16"}) == {"batch.update_rows": 1}


def test_changes_do_what_they_promise() -> None:
    known = replace(SIZES, forward_numbers_per_row=80)
    evaluation = {"prompts": ["a"], "rewards": [{"reward": "y"}]}
    whole = recipe(evaluation=evaluation)
    for usable in range(9000, 80000, 500):
        changes = cheapest(usable, known, evaluation=evaluation)
        if changes is None:
            continue
        sections = whole.model_dump(exclude={"lora"})
        for key, value in changes.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        assert estimate_memory(Recipe.model_validate(sections), known, COST).device <= usable


def test_what_is_on_already_is_not_asked_for() -> None:
    settings = {
        "batch": {"states": "host", "update_rows": 1},
        "run": {"gradient_checkpointing": True, "precision": "bf16"},
        "lora": {"rank": 1},
    }
    assert cheapest(2000 + 16 * 7 + 1000, **settings) == {}
    assert cheapest(2000 + 16 * 7 + 999, **settings) == ALONE
    settings["run"]["encode_alone"] = True
    assert cheapest(2000 + 16 * 7 + 119, **settings) is None


def test_lora_is_not_asked_of_a_model_without_it() -> None:
    assert cheapest(9168 + 1000, replace(SIZES, lora_parameters_per_rank=0)) is None


def test_a_plan_says_which_gpus_suffice(command: Callable[..., Outcome]) -> None:
    done = command("plan", "guest")
    assert done.code == 0
    assert f"Fits on: {', '.join(gpu.name for gpu in GPUS)}." in done.out.splitlines()
    assert "92% of a GPU's memory" in done.out


def test_gpus_are_listed_by_what_they_need() -> None:
    small, middle, large = (Gpu(name, 1.0) for name in ("small", "middle", "large"))
    states = {"batch.states": "host"}
    both = {**states, "run.gradient_checkpointing": True}
    assert fits_lines([Fit(small, None), Fit(middle, states), Fit(large, {})])[:3] == [
        "Fits on: large.",
        "With batch.states=host: middle.",
        "Too small, however states, batches, gradient checkpointing, precision, LoRA and quantisation are set: small.",
    ]
    assert fits_lines([Fit(small, both), Fit(middle, states), Fit(large, states)])[:3] == [
        "Fits on none of the GPUs known here. What to change:",
        "With batch.states=host: middle, large.",
        "With batch.states=host run.gradient_checkpointing=true: small.",
    ]
    assert fits_lines([Fit(small, None)])[0] == "Fits on none of the GPUs known here."


# --- what is printed ---


def shown(plan: RunPlan) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_plan(console, plan)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().replace("│", " ").split())


def test_predictions_and_rows_are_told_apart_under_guidance() -> None:
    one = planned(batch__prompts=3)
    two = shown(replace(one, rows_per_prediction=2))
    assert "rollout predictions 203 609 gradient predictions 187 561" in two
    assert "rollout rows (guidance, x2) 406 1218 gradient rows (guidance, x2) 374 1122" in two
    assert "rollout rows 203 609 gradient rows 187 561" in shown(one)
    assert "guidance" not in shown(one)


def test_what_is_not_counted_is_said() -> None:
    one = planned()
    whole = replace(one.footprint, forward_numbers_per_row=1, conditioning_numbers=1)
    never = "kernels' workspaces, activations of encoders and reward models. "
    reward = "Not counted: reward models whose size is not known (guest_brightness), "
    rollout = "activations of the rollout (batch.rollout_rows), encoded prompts"
    assert f"{reward}the decoder's own activations, {rollout}, {never}" in shown(one)
    assert f"{reward}the decoder's own activations, {never}" in shown(replace(one, footprint=whole))
    decoder = DecoderFootprint(parameters=1, numbers_per_row=1, flops_per_row=1.0, media_numbers_per_row=1)
    known = replace(one, footprint=replace(whole, decoder=decoder), rewards=RewardSizes(()))
    assert f"Not counted: {never}" in shown(known)


def test_reward_models_are_named_with_their_size() -> None:
    kept, offloaded = RewardFootprint(3 * GIB), RewardFootprint(GIB, offloads=True, assumed="org/known")
    sizes = RewardSizes((RewardSize("a", kept),), (RewardSize("b", offloaded), RewardSize("c", RewardFootprint(0))))
    text = shown(replace(planned(), rewards=sizes))
    assert "Reward models: a 3 GiB, b 1 GiB (leaves the device between its calls). " in text
    assert "Warning: the size of the reward 'b' is assumed to be that of org/known; the figures above may" in text


def test_decoding_has_a_share_of_the_time() -> None:
    """A decoder in float32 is taken to go half as fast as a denoiser in bf16."""
    one = planned()
    assert one.decoder_flops == 0
    decoder = DecoderFootprint(1, numbers_per_row=1, flops_per_row=4e14, media_numbers_per_row=1)
    sizes = replace(one.footprint, forward_flops_per_row=4e12, decoder=decoder)
    same = replace(one, footprint=sizes)
    assert same.decoder_flops == 16 * 4e14
    assert "23.6 s, of which rollout 2.03 s, gradient pass 5.61 s and decoding 16 s (67.7%)" in shown(same)
    kept = replace(sizes, decoder=replace(decoder, number_bytes=4))
    reduced = replace(planned(run__precision="bf16"), footprint=kept)
    assert "decoding 32 s (80.7%)" in shown(reduced) and "half of it for a decoder in float32" in shown(reduced)


def test_the_time_is_an_estimate_at_a_stated_rate() -> None:
    one = planned()
    fast = replace(one, footprint=replace(one.footprint, forward_flops_per_row=4e12))
    text = "Estimated time: 7.64 s, of which rollout 2.03 s and gradient pass 5.61 s, assuming 400 TFLOP/s"
    assert text in shown(fast)  # 203 rows and three times 187, at a hundredth of a second each


def test_a_plan_needs_no_reward_installed() -> None:
    reward = [{"reward": "no_such_reward", "model": "x"}]
    assert planned(rewards=reward, evaluation__rewards=reward).rollout_rows == 203


# --- drawings ---


def drawn(**tree: Any) -> str:
    return dedent(draw_tree(schedule(**tree).plan(0, 0)))


def test_a_tree_that_splits_twice_is_drawn() -> None:
    picture = """\
        0  1  2  3
        ┬━━━━━┬━━───o
        │     └━━───o
        └━━━━━┬━━───o
              └━━───o"""
    assert drawn(steps=4, splits=[0, 2]) == dedent(picture)


def test_deterministic_steps_are_drawn_light() -> None:
    picture = """\
        0  1  2  3  4
        ───┬━━─────────o
           ├━━─────────o
           └━━─────────o"""
    assert drawn(steps=5, splits=[1], branches=3, sde="splits") == dedent(picture)


def test_a_wide_tree_is_cut_short() -> None:
    lines = draw_tree(schedule(steps=4, splits=[0], branches=20).plan(0, 0), max_leaves=3).splitlines()
    assert len(lines) == 5
    assert lines[-1].strip() == "... and 17 more leaves"
