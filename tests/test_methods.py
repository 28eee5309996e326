"""The baselines against readings of their papers, and what they are made of: solver, continuation, parts, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import baselines
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from sessions import Prompts
from sessions import grown as grown_by_session
from tiny_flux import tiny_flux
from torch import Tensor, nn
from training_runs import iterated, metrics, opened, small

from branchtree import load_recipe, plan, train
from branchtree.core.gaussian import DanceSde, FlowSde
from branchtree.core.grid import time_grid
from branchtree.core.noise import IndependentSiblings, NoiseSource, Purpose, generator
from branchtree.core.pruning import trainable_edges
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import DrawnSplits, FixedSplits, Schedule, TreePlan, skipped_steps
from branchtree.core.scores import Scores
from branchtree.core.solvers import SolverHistory, dpm2m
from branchtree.core.tree import BranchTree, grow
from branchtree.errors import RecipeError
from branchtree.recipe.build import make_schedule
from branchtree.recipe.load import method_names
from branchtree.testing.probe import counted_rows
from branchtree.training.continuation import ContinuationWatch, _compared
from branchtree.training.session import Session
from branchtree.training.trainer import Trainer

LATENT = (2, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


# --- the solver ---


def velocity(latents: Tensor, sigma: Tensor, prompt: Tensor | None = None) -> Tensor:
    """A velocity that knows neither prompt nor batch."""
    return (latents * 1.3).tanh() + sigma.view(-1, *[1] * (latents.ndim - 1)) * 0.5


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_the_solver_is_diffusers_dpm_solver(steps: int) -> None:
    """From below sigma = 1, where a trajectory's ODE begins after a stochastic step, down to 0."""
    sigmas = time_grid(steps + 3, 3.0)[3:]
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * 1000
    ours = theirs = torch.randn(4, *LATENT, generator=torch.Generator().manual_seed(0))
    memory = SolverHistory.empty(ours)
    for step in range(steps):
        here, there = (sigmas[step + offset].expand(4) for offset in (0, 1))
        ours, memory = dpm2m(ours, velocity(ours, here), here, there, memory)
        theirs = scheduler.step(velocity(theirs, here), scheduler.timesteps[step], theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_step_from_pure_noise_is_eulers() -> None:
    latents = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    here, there = torch.ones(1), torch.tensor([0.8])
    solved, _ = dpm2m(latents, velocity(latents, here), here, there, SolverHistory.empty(latents))
    torch.testing.assert_close(solved, latents + velocity(latents, here) * (there - here).view(1, 1, 1))


# --- the continuation ---


@given(first=st.integers(0, 20), more=st.integers(0, 20), kept=st.integers(1, 25))
def test_a_continuation_keeps_so_many_steps_evenly(first: int, more: int, kept: int) -> None:
    steps = first + more
    left_out = skipped_steps(first, steps, kept)
    remaining = [step for step in range(first, steps) if step not in left_out]
    assert len(remaining) == min(kept, more)
    assert remaining[:1] == [first][: len(remaining)]
    gaps = [b - a for a, b in pairwise([*remaining, steps])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def grown(plans: list[TreePlan], ids: list[int], solver: str = "euler", **options: Any) -> BranchTree:
    source = NoiseSource(42, 7)
    initial = torch.cat([source.normal(Purpose.INITIAL, prompt, 0, [0], LATENT) for prompt in ids])
    sampler = Sampler(DanceSde(0.7), IndependentSiblings(), time_grid(plans[0].steps, 3.0), solver=solver)
    return rollout(options.pop("model", velocity), sampler, grow(plans), initial, source, ids, **options)


SINGLE = Schedule(12, DrawnSplits(3, 8, 4, seed=0), sde="splits", continuation=3)
PLANS = [SINGLE.plan(0, prompt) for prompt in range(4)] + [Schedule(12, FixedSplits((0, 2), (2, 2))).plan(0, 4)]


def test_a_coarse_continuation_is_eulers_method_on_the_steps_that_remain() -> None:
    sigmas = time_grid(12, 3.0)
    tree = grown(PLANS[:4], [0, 1, 2, 3])
    for prompt, plan_ in enumerate(PLANS[:4]):
        first = plan_.last_stochastic + 1
        remaining = [step for step in range(first, 12) if step not in plan_.skipped]
        assert len(remaining) == 3
        span = tree.topology.span(prompt, first)
        states = tree.states[first][span.start : span.stop]
        for here, there in pairwise([*remaining, 12]):
            states = states + velocity(states, sigmas[here].expand(len(states))) * (sigmas[there] - sigmas[here])
        span = tree.topology.span(prompt, 12)
        torch.testing.assert_close(tree.leaves[span.start : span.stop], states)


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
@pytest.mark.parametrize("limit", [None, 1, 3])
def test_continued_trees_do_not_depend_on_their_batch(solver: str, limit: int | None) -> None:
    together = grown(PLANS, [0, 1, 2, 3, 4], solver, max_rows=limit)
    for prompt, plan_ in enumerate(PLANS):
        alone = grown([plan_], [prompt], solver)
        span = together.topology.span(prompt, 12)
        torch.testing.assert_close(together.leaves[span.start : span.stop], alone.leaves, rtol=1e-5, atol=1e-5)


def test_only_evaluated_nodes_are_sent_through_the_model() -> None:
    rows: list[int] = []

    def counting(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        rows.append(len(latents))
        return velocity(latents, sigma)

    grown(PLANS, [0, 1, 2, 3, 4], model=counting)
    # Until a split one row a step, then four for three steps; the last tree has 1 + 2 * 2 + 9 * 4.
    assert sum(rows) == sum(plan_.last_stochastic + 1 + 3 * 4 for plan_ in PLANS[:4]) + 1 + 2 * 2 + 9 * 4
    assert sum(rows) == grow(PLANS).rollout_rows


def test_the_solver_serves_only_what_follows_the_last_stochastic_step() -> None:
    euler, solved = grown(PLANS, [0, 1, 2, 3, 4]), grown(PLANS, [0, 1, 2, 3, 4], "dpm2m")
    for prompt, plan_ in enumerate(PLANS):
        for depth in range(13):
            span = euler.topology.span(prompt, depth)
            same = torch.equal(
                euler.states[depth][span.start : span.stop], solved.states[depth][span.start : span.stop]
            )
            # The first step after it has no step before it, and is Euler's up to rounding.
            assert same == (depth <= plan_.last_stochastic + 1) or depth == plan_.last_stochastic + 2


@pytest.mark.parametrize(
    ("stochastic", "skipped", "message"),
    [
        ((True, False, False), {0}, "cannot be skipped"),
        ((True, False, False), {1, 2}, "cannot be joined with the last step"),
    ],
)
def test_what_cannot_be_skipped(stochastic: tuple[bool, ...], skipped: set[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreePlan((1, 1, 1), stochastic, (False,) * 3, frozenset(skipped))


# --- a part of the steps ---


def test_each_trajectory_trains_its_own_part_of_the_steps() -> None:
    schedule = Schedule(20, FixedSplits((0,), (16,)), fraction=0.6, seed=3)
    topology = grow([schedule.plan(5, prompt) for prompt in (7, 8)])
    mask = torch.stack([level[topology.ancestor[depth]] for depth, level in enumerate(trainable_edges(topology))])
    assert mask.sum(dim=0).tolist() == [11] * 32  # of 19, rounded down, as in the released trainer
    drawn = {tuple(column.tolist()) for column in mask.T}
    assert len(drawn) == 32
    counts = mask[1:-1].double().mean(dim=1)
    assert float((counts - 11 / 19).abs().max()) < 4 * math.sqrt(0.25 / 32)
    again = trainable_edges(grow([schedule.plan(5, 8)]))
    assert all(
        torch.equal(a, b[b.numel() - a.numel() :]) for a, b in zip(again, trainable_edges(topology), strict=True)
    )
    other = trainable_edges(grow([schedule.plan(6, 8)]))
    assert any(not torch.equal(a, b) for a, b in zip(again, other, strict=True))


# --- weights ---


def test_noise_weights_follow_the_noise_and_have_mean_one() -> None:
    sigmas = time_grid(10, 3.0)
    steps = torch.arange(9)
    sampler = Sampler(FlowSde(0.7), IndependentSiblings(), sigmas)
    weights = sampler.noise_weights(steps, steps + 1, torch.ones(9, dtype=torch.bool))
    levels = [float(s) for s in sigmas]
    std = []
    for here, there in pairwise(levels[:-1]):
        base = there if here == 1 else here
        std.append(0.7 * math.sqrt(here / (1 - base)) * math.sqrt(here - there))
    assert weights.tolist() == pytest.approx([value / (sum(std) / 9) for value in std], rel=1e-5)
    assert float(weights.mean()) == pytest.approx(1)


# --- whole methods ---

STEPS, BRANCHES = 6, 4
COMMON: dict[str, Any] = {
    "tree.steps": STEPS,
    "batch.prompts": 1,
    "run.iterations": 1,
    "optim.max_grad_norm": 1e9,
}


def first_tree(session: Session) -> tuple[BranchTree, Mapping[str, Scores], dict[str, Tensor], list[int]]:
    """The first iteration's trees and scores, the encoded prompts, and their addresses."""
    prompts = Prompts.of(session, 0)
    tree, scores = grown_by_session(session, 0, prompts)
    return tree, scores, dict(prompts.policy.conditioning), list(prompts.batch.ids)


def first_gradient(session: Session) -> list[Tensor]:
    """The gradient that the first update takes; the weights are put back."""
    gradient: list[Tensor] = []

    def keep(*_: Any) -> None:
        gradient.extend(parameter.grad.clone() for parameter in session.updater.engine.parameters.values())

    session.updater.optimizer.optimizer.register_step_pre_hook(keep)
    weights = [parameter.detach().clone() for parameter in session.updater.engine.parameters.values()]
    Trainer(session, []).run(resume=False)
    with torch.no_grad():
        for parameter, before in zip(session.updater.engine.parameters.values(), weights, strict=True):
            parameter.copy_(before)
    return gradient


METHODS = {
    "dancegrpo": ({"tree.branches": BRANCHES}, lambda s: (range(STEPS - 1), lambda here, there: 0.7, None)),
    "mixgrpo": (
        {"tree.branches": BRANCHES, "tree.window.size": 2, "tree.window.start": 2},
        lambda s: (range(2, 4), lambda here, there: 0.7, None),
    ),
    "tempflow": (
        {"tree.branches": BRANCHES},
        lambda s: (
            range(s, s + 1),
            lambda here, there: 0.7 * math.sqrt(here / (1 - (there if here == 1 else here))),
            "noise",
        ),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_baseline_is_the_baseline(name: str, model: Path, tmp_path: Path) -> None:
    """Rollout, rewards and gradient of one update, against a trajectory at a time."""
    changes, describe = METHODS[name]
    session = opened(f"quickstart+{name}", {**untreed(model), **COMMON, **changes}, tmp_path / "run")
    tree, scores, conditioning, [prompt] = first_tree(session)
    gradient = first_gradient(session)
    adapter, split = session.inputs.model, tree.topology.plans[0].splits[0]
    sde, level, weighting = describe(split)
    sigmas = [float(sigma) for sigma in session.sampler.sigmas]
    std = [level(here, there) * math.sqrt(here - there) for here, there in pairwise(sigmas[:-1])]
    weights = [value / (sum(std) / len(std)) for value in std] if weighting else None
    method = baselines.Method(sde, level, weights)

    def single(x: Tensor, sigma: float) -> Tensor:
        return adapter.predict(x[None], torch.tensor([sigma]), conditioning)[0]

    recipe = session.recipe
    start = adapter.initial_noise(generator(recipe.tree.noise_seed, 0, prompt, 0, 0, Purpose.INITIAL))
    source, siblings = NoiseSource(recipe.seed, 0), IndependentSiblings()
    drawn = {
        step: siblings.draw(source, prompt, step + 1, range(1 if step == split else BRANCHES),
                          BRANCHES if step == split else 1, start.shape)
        for step in sde
    }  # fmt: skip
    with torch.no_grad():
        paths = [
            baselines.trajectory(single, start, sigmas, {step: noise[k] for step, noise in drawn.items()}, method)
            for k in range(BRANCHES)
        ]
    leaves = torch.stack([path[-1] for path in paths])
    torch.testing.assert_close(tree.leaves, leaves, rtol=1e-5, atol=2e-6)
    rewards = scores["digits"].values.double()
    baselines.loss(single, paths, rewards, sigmas, method).backward()
    expected = [parameter.grad for parameter in session.updater.engine.parameters.values()]
    largest = max(float(part.abs().max()) for part in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(gradient, expected, strict=True))
    assert largest > 0
    assert difference <= 1e-6 * max(largest, 1.0)


@pytest.mark.parametrize("method", method_names())
def test_every_method_runs_and_does_the_work_that_is_planned(method: str, model: Path, tmp_path: Path) -> None:
    changes = untreed(model, run__iterations=1)
    expected = plan(f"quickstart+{method}", changes)
    session = opened(f"quickstart+{method}", changes, tmp_path / "run")
    with counted_rows(session.inputs.model.denoiser) as rows, counted_rows(session.old or nn.Module()) as old:
        (row,) = iterated(session)
    counted = ("rollout", "reference", "rescored", "continuation_check")
    assert rows.rollout + old.rollout == sum(row.get(f"rows/{name}", 0) for name in counted)
    assert row["rows/rollout"] == expected.rollout_rows
    assert 0 < row["rows/gradient"] == rows.gradient <= expected.gradient_rows


def test_a_method_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(RecipeError, match=r"no method 'mixgrp'; did you mean 'mixgrpo'\?"):
        load_recipe("quickstart+mixgrp")


def test_a_path_may_hold_the_sign_of_methods(tmp_path: Path) -> None:
    """The run of `quickstart+mixgrpo` lies in a folder of that name, with its recipe."""
    folder = tmp_path / "quickstart+mixgrpo"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("extends: quickstart\n")
    assert load_recipe(folder / "recipe.yaml").tree.splits == "dense"
    put = load_recipe(f"{folder / 'recipe.yaml'}+mixgrpo+tempflow")
    assert (put.name, put.tree.splits) == ("recipe+mixgrpo+tempflow", "single")


def test_methods_put_any_base_under_their_settings() -> None:
    """Whatever a base says of its tree, a method's own settings replace it."""
    single = load_recipe("quickstart_single+branchgrpo")
    plain = load_recipe("quickstart+branchgrpo")
    assert (single.tree, single.credit, single.loss) == (plain.tree, plain.credit, plain.loss)
    assert single.name == "quickstart_single+branchgrpo"
    assert make_schedule(load_recipe("quickstart+mixgrpo")).plan(25, 0).splits == (1,)


# --- does the short cut part from the whole grid? ---


def untreed(model: Path, **changes: Any) -> dict[str, Any]:
    """The overrides of a small run, but for its tree."""
    return {key: value for key, value in small(model, **changes).items() if not key.startswith("tree.")}


def test_the_continuation_is_compared_with_the_whole_grid(model: Path, tmp_path: Path) -> None:
    """Without a continuation the same prompts split at the same steps by the same noise: these are the whole grid's."""
    overrides = {**untreed(model, run__iterations=3), "tree.branches": 6}
    whole = first_tree(opened("quickstart+single", overrides, tmp_path / "whole"))[1]["digits"].values[:6].double()
    short = first_tree(opened("quickstart+single_coarse", overrides, tmp_path / "short"))[1]["digits"].values
    train("quickstart+single_coarse", {**overrides, "tree.continuation_check": 2}, output=tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert ["continuation/gap/digits" in row for row in rows] == [True, False, True]
    gap = (whole - short[:6].double()).mean() / short.double().std()
    assert rows[0]["continuation/gap/digits"] == pytest.approx(float(gap), rel=1e-3)
    together = torch.corrcoef(torch.stack([whole, short[:6].double()]))[0, 1]
    assert rows[0]["continuation/correlation/digits"] == pytest.approx(float(together), abs=1e-3)
    split = next(step for step in range(20) if rows[0]["rows/continuation_check"] == 6 * (20 - step - 1))
    assert 6 <= split <= 15  # drawn between .3 and .75 of the steps


def test_both_figures_of_a_reward() -> None:
    def scores(*values: float) -> Scores:
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))

    coarse = scores(1.0, 2.0, 3.0, 7.0, 7.0)  # the last two are another prompt's
    found = _compared("judge", scores(9.0, 8.0, 7.0), coarse, slice(0, 3))
    assert found["continuation/correlation/judge"] == pytest.approx(-1)
    assert found["continuation/gap/judge"] == pytest.approx(6 / float(coarse.values.std()))
    assert _compared("judge", scores(1.0, 1.0, 1.0), coarse, slice(0, 3)) == {}


def test_parting_from_the_whole_grid_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = ContinuationWatch()
    for gap, correlation in [(-2.0, 1.0), (-2.9, 0.6), (-1.2, 0.9)]:
        watch.look({"continuation/gap/a": gap, "continuation/correlation/a": correlation})
    assert not caplog.records  # a gap that was there from the start says nothing
    for _ in range(2):
        watch.look({"continuation/gap/a": -3.1, "continuation/correlation/a": 0.9})
        watch.look({"continuation/gap/b": 0.0, "continuation/correlation/b": 0.4})
    assert len(caplog.records) == 2
    assert "by reward 'a' the gap has moved by -1.10 of the rewards' deviations" in caplog.text
    assert "by reward 'b' the gap has moved by 0.00" in caplog.text and "correlation is 0.40" in caplog.text
