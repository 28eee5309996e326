"""Noise that differs from split to split, and steps that are joined: plans, transitions, weights, refusals, runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from strategies import make_plan
from tiny_flux import tiny_flux
from training_runs import metrics, small

from branchtree import load_recipe, plan, train
from branchtree.core.gaussian import CpsSde, DanceSde, Ddim, FlowSde, GaussianKernel
from branchtree.core.grid import time_grid
from branchtree.core.noise import IndependentSiblings, NoiseSource
from branchtree.core.pruning import trainable_edges
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import Branching, FixedSplits, Schedule, TreePlan
from branchtree.core.sharing import cut
from branchtree.core.tree import grow, grow_shares
from branchtree.errors import RecipeError
from branchtree.recipe.build import make_schedule, most_noise

# --- plans ---


def test_a_step_has_the_noise_of_the_last_split_before_it() -> None:
    planned = Schedule(6, FixedSplits((1, 3), (2, 2)), noise=(0.5, 2.0)).plan(0, 0)
    assert planned.noise == (0.5, 0.5, 0.5, 2.0, 2.0, 2.0)
    assert [planned.active(step) for step in range(6)] == [0.5, 0.5, 0.5, 2.0, 2.0, False]
    plain = Schedule(6, FixedSplits((1, 3), (2, 2))).plan(0, 0)
    assert plain.noise == ()
    assert grow([plain]).active(1).dtype == torch.bool
    assert grow([plain, planned]).active(1).tolist() == [1.0, 0.5]


def test_joined_steps_are_skipped_and_not_stochastic() -> None:
    planned = Schedule(8, FixedSplits((0, 3), (2, 2)), join=(3, 2)).plan(0, 0)
    assert planned.skipped == {1, 2, 4}
    assert planned.target == (3, 3, 3, 5, 5, 6, 7, 8)
    assert [step for step, flag in enumerate(planned.stochastic) if flag] == [0, 3, 5, 6]
    assert grow([planned]).rollout_rows == 1 + 2 + 4 + 4 + 4  # depths 0, 3, 5, 6 and 7
    coarse = Schedule(8, FixedSplits((0,), (2,)), "splits", continuation=3, join=2).plan(0, 0)
    assert coarse.skipped == {1, 3, 5, 7}
    deepest = Schedule(8, FixedSplits((5,), (2,)), "splits", join=9).plan(0, 0)
    assert deepest.target[5] == 7  # the last step stays deterministic


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(6, FixedSplits((1, 3), (2, 2)), noise=(1.0,)), "2 splits need as many noise levels, not 1"),
        (Schedule(6, FixedSplits((1, 3), (2, 2)), join=3), "beyond the split at step 3"),
        (Schedule(6, FixedSplits((1, 3), (2, 2)), join=(1, 1, 1)), "2 splits need as many lengths"),
    ],
)
def test_schedules_refuse_what_does_not_fit(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.plan(0, 0)


def test_noise_is_a_positive_factor_for_each_step() -> None:
    with pytest.raises(ValueError, match="positive factor for each of 2 steps"):
        TreePlan((2, 1), (True, False), (True, False), noise=(1.0,))
    with pytest.raises(ValueError, match="positive factor"):
        TreePlan((2, 1), (True, False), (True, False), noise=(0.0, 1.0))


# --- kernels, and what a rollout does with them ---

KERNELS = [DanceSde(0.4), FlowSde(0.4), CpsSde(0.4), Ddim(0.4, "v")]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_a_factor_of_the_noise_is_another_eta(kernel: GaussianKernel) -> None:
    latents, prediction = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    sigma, sigma_next = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.6, 0.4, 0.4])
    active = torch.tensor([1.0, 2.0, 0.0])
    scaled = kernel(latents, prediction, sigma, sigma_next, active)
    other = type(kernel)(0.8, *([kernel.prediction] if isinstance(kernel, Ddim) else []))
    for row, (expected, on) in enumerate([(kernel, True), (other, True), (kernel, False)]):
        at = slice(row, row + 1)
        alone = expected(latents[at], prediction[at], sigma[at], sigma_next[at], torch.tensor([on]))
        torch.testing.assert_close(scaled.mean[at], alone.mean)
        torch.testing.assert_close(scaled.std[at], alone.std)
    torch.testing.assert_close(kernel.noise_scale(sigma, sigma_next, active), scaled.std.flatten())


def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return 0.3 * latents - sigma[:, None] + prompt[:, None]


def test_a_rollout_follows_the_noise_and_the_joined_steps_of_its_plan() -> None:
    """Every edge against float64 formulas: its mean and density from its parent, at its own noise and target."""
    schedule = Schedule(6, FixedSplits((1, 3), (3, 2)), noise=(0.5, 2.0), join=(2, 1))
    plans = [schedule.plan(0, 0), make_plan(6, {2: 2})]
    topology, sigmas, eta = grow(plans), time_grid(6, 2.0), 0.6
    sampler = Sampler(DanceSde(eta), IndependentSiblings(), sigmas)
    tree = rollout(velocity, sampler, topology, torch.randn(2, 4), NoiseSource(1, 2), [5, 6])
    levels = [float(sigma) for sigma in sigmas]
    for step in range(6):
        for child, parent in enumerate(topology.parent[step + 1].tolist()):
            prompt = int(topology.root[step][parent])
            planned = plans[prompt]
            before, after = tree.states[step][parent].tolist(), tree.states[step + 1][child].tolist()
            if step in planned.skipped:
                assert before == after
                continue
            factor = float(planned.active(step))
            here, there = levels[step], levels[planned.target[step]]
            logs = []
            for x, y in zip(before, after, strict=True):
                mean, std = reference.dance(eta * factor)(x, 0.3 * x - here + prompt, here, there, factor > 0)
                if factor == 0:
                    assert y == pytest.approx(mean, abs=1e-5)
                else:
                    logs.append(-0.5 * ((y - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi))
            expected = sum(logs) / 4 if logs else 0.0
            assert float(tree.log_prob[step + 1][child]) == pytest.approx(expected, abs=1e-4)


def test_noise_weights_see_a_steps_noise_and_target() -> None:
    sigmas = time_grid(6, 2.0)
    sampler = Sampler(DanceSde(0.6), IndependentSiblings(), sigmas)
    weights = sampler.noise_weights(torch.tensor([1, 3]), torch.tensor([3, 4]), torch.tensor([0.5, 2.0]))
    gaps = [math.sqrt(float(sigmas[i] - sigmas[i + 1])) for i in range(5)]
    wide = math.sqrt(float(sigmas[1] - sigmas[3]))
    assert weights.tolist() == pytest.approx([0.5 * wide / (sum(gaps) / 5), 2 * gaps[3] / (sum(gaps) / 5)])


# --- a deterministic sibling ---


def still_plan() -> TreePlan:
    schedule = Schedule(5, FixedSplits((1,), (4,)), "splits")
    return schedule.shaped(Branching({1: 4}, {1: 2.0}, still=True), 0, 0)


def test_the_first_child_takes_the_deterministic_step_and_is_not_trained() -> None:
    topology = grow([make_plan(5, {0: 2}), still_plan()])
    sampler = Sampler(DanceSde(0.6), IndependentSiblings(), time_grid(5))
    tree = rollout(velocity, sampler, topology, torch.randn(2, 4), NoiseSource(1, 2), [5, 6])
    start = tree.states[0][1:]
    alone = rollout(velocity, sampler, grow([make_plan(5, {}, stochastic=[])]), start, NoiseSource(0, 0), [0])
    assert topology.still(1).tolist() == [False, False, True, False, False, False]
    # The prompt's index is part of the toy policy: it is 1 there and 0 here.
    shift = sum(float(a - b) for a, b in zip(sampler.sigmas[1:], sampler.sigmas[:-1], strict=True))
    assert abs(shift) == pytest.approx(1)
    leaf = tree.leaves[2]
    expected = start[0]
    for step in range(5):
        here, there = sampler.sigmas[step], sampler.sigmas[step + 1]
        expected = expected + (0.3 * expected - here + 1) * (there - here)
    torch.testing.assert_close(leaf, expected)
    assert not torch.equal(alone.leaves[0], leaf)
    assert tree.log_prob[2].tolist()[2] == 0
    assert trainable_edges(topology)[2].tolist() == [True, True, False, True, True, True]
    shares = [grow_shares([share]).still(1).tolist() for share in cut(still_plan(), 2)]
    assert shares == [[True, False], [False, False]]


# --- recipes and runs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.eta": [0.5, 0.7]}, "sampler.eta: 4 splits need as many noise levels, not 2"),
        ({"sampler.eta": [0.5, 0.7, 0.2, 1.1], "sampler.kind": "cps"}, "cps takes an eta up to 1"),
        ({"tree.join": 4}, "4 steps from split 0 reach beyond step 3, the next split"),
        ({"tree.join": [1, 1, 1, 11]}, "11 steps from split 9 reach beyond step 19, the last step"),
        ({"tree.join": [1, 2]}, "4 splits need as many lengths in join, not 2"),
        ({"tree.join": 0}, "a split takes at least its own step"),
    ],
)
def test_recipes_refuse_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", changes)


def test_a_list_of_levels_is_the_mean_and_factors() -> None:
    recipe = load_recipe("quickstart", {"sampler.eta": [0.9, 0.7, 0.5, 0.3], "tree.join": [3, 1, 2, 1]})
    assert recipe.sampler.level == pytest.approx(0.6)
    planned = make_schedule(recipe).plan(0, 0)
    assert [recipe.sampler.level * planned.noise[step] for step in (0, 3, 6, 9, 18)] == pytest.approx(
        [0.9, 0.7, 0.5, 0.3, 0.3]
    )
    assert plan(recipe).iteration.rollout_rows < plan("quickstart").iteration.rollout_rows
    assert most_noise(recipe.sampler) * recipe.sampler.level == pytest.approx(10)
    cps = load_recipe("quickstart", {"sampler.kind": "cps", "sampler.eta": 0.5})
    assert most_noise(cps.sampler) * cps.sampler.level == pytest.approx(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_the_gradient_pass_scores_what_the_rollout_drew(model: Path, tmp_path: Path) -> None:
    changes = {"sampler__eta": [0.4, 1.2], "tree__join": [1, 2], "loss__weighting": "noise", "run__iterations": 1}
    recipe = load_recipe("quickstart", small(model, **changes))
    train(recipe, output=tmp_path / "run")
    row = metrics(tmp_path / "run")[0]
    assert row["rows/rollout"] == plan(recipe).rollout_rows
    assert row["log_prob/mismatch_max"] < 1e-5
    assert row["edges/trained"] > 0
