"""Splits that follow from what siblings showed: allocation, the bandit over steps, the noise, and whole runs."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Python
from guests import fake_distribution
from hypothesis import assume, given
from hypothesis import strategies as st
from picky_digits import read_picky
from strategies import thorough
from tiny_flux import tiny_flux
from training_runs import arguments, metrics, small, weights

from branchtree import load_recipe, plan, train
from branchtree.core.adaptive import (
    RECENT,
    AdaptiveSplits,
    Outcome,
    SplitRewards,
    State,
    _follow,
    _got_worse,
    allocate,
    observed,
    plan_ahead,
    plan_learned,
)
from branchtree.core.fusion import NodeValues
from branchtree.core.schedule import Branching, FixedSplits, Schedule
from branchtree.core.tree import Topology, grow
from branchtree.errors import RecipeError
from branchtree.recipe.build import make_schedule

SCRIPT = Path(__file__).with_name("picky_digits.py")
STEPS, CANDIDATES = 12, (4, 5, 6, 7, 8)
RULE = AdaptiveSplits(CANDIDATES, tuple(STEPS - 1 - step for step in CANDIDATES), branches=8, most=16, seed=3)

# --- allocation ---

wants = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=8)


@given(wants, st.integers(0, 900))
@thorough
def test_a_budget_is_given_out_within_its_limits(each: list[tuple[float, int]], budget: int) -> None:
    wanted, rows = [want for want, _ in each], [count for _, count in each]
    counts = allocate(wanted, rows, 3, 11, budget)
    spent = sum(count * row for count, row in zip(counts, rows, strict=True))
    assert all(3 <= count <= 11 for count in counts)
    assert spent <= budget or counts == [3] * len(counts)
    for count, row, want in zip(counts, rows, wanted, strict=True):
        assert count == 11 or spent + row > budget or (want == 0 < sum(wanted))


def test_children_follow_what_is_wanted() -> None:
    assert allocate([1, 2, 3], [1, 1, 1], 2, 100, 60) == [10, 20, 30]
    assert allocate([0, 2, 3], [1, 1, 1], 3, 100, 53) == [3, 20, 30]  # a prompt that ties keeps the least
    assert allocate([0, 0], [2, 2], 2, 100, 40) == [10, 10]
    assert allocate([1, 9], [1, 1], 2, 12, 30) == [12, 12]


# --- what a tree shows ---


ALONE = {"reward": 1.0}


def scored(
    plans: list[Any], rewards: Mapping[str, list[float]], valid: list[bool] | None = None
) -> tuple[Topology, dict[str, NodeValues]]:
    topology, values = grow(plans), {}
    for name, each in rewards.items():
        flags = [torch.ones(topology.width(depth), dtype=torch.bool) for depth in topology.depths]
        flags[-1] = torch.tensor(valid or [True] * len(each))
        value = [torch.zeros(topology.width(depth), dtype=torch.float64) for depth in topology.depths]
        value[-1] = torch.tensor(each, dtype=torch.float64)
        values[name] = NodeValues(tuple(value), tuple(flags))
    return topology, values


def judged(noisy: list[float], still: float | None, rounding: float = 1e-6) -> SplitRewards:
    return SplitRewards(torch.tensor(noisy, dtype=torch.float64), still, rounding)


def shaped(rule: AdaptiveSplits, step: int, children: int, noise: float = 1.0) -> Any:
    return Schedule(STEPS, rule, "splits").shaped(Branching({step: children}, {step: noise}, still=True), 0, 0)


def test_the_deterministic_sibling_is_apart_from_the_others() -> None:
    plans, rewards = [shaped(RULE, 5, 4), shaped(RULE, 7, 3)], [5.0, 1.0, 2.0, 3.0, 4.0, 1.0, 1.0]
    topology, values = scored(plans, {"reward": rewards})
    outcomes = [observed(topology, values, ALONE, i) for i in range(2)]
    first, second = (each.rewards["reward"] for each in outcomes if each is not None)
    assert (first.noisy.tolist(), first.still, first.spread) == ([1.0, 2.0, 3.0], 5.0, 1.0)
    assert first.rounding == pytest.approx(2e-6 * 5)
    assert (second.spread, second.still) == (0.0, 4.0)
    topology, values = scored(plans, {"reward": rewards}, [False, True, True, True, True, True, False])
    one, two = (observed(topology, values, ALONE, i) for i in range(2))
    assert one is not None and two is None
    assert (one.step, one.rewards["reward"].spread, one.ratio) == (5, 1.0, None)


@pytest.mark.parametrize(
    ("noisy", "still", "ratio"),
    [
        ([-2.0, 0.0, 2.0], 0.5, 0.25),
        ([-2.0, 0.0, 2.0], -0.5, -0.25),
        ([-1.0, 0.0, 1.0], 9.0, 1.0),
        ([-1.0, 0.0, 1.0], -9.0, -1.0),
        ([0.0, 0.0], 0.0, 0.0),  # a tie: too little noise
        ([1.0, 1.0], 1.0 + 5e-7, 0.0),
        ([0.0, 0.0], -0.5, -1.0),
        ([0.0, 0.0], 0.5, 1.0),  # all are equally bad: too much
        ([-1.0, 1.0], None, None),
    ],
)
def test_the_ratio_is_of_the_drop_to_the_spread_and_a_tie_of_all_is_no_damage(
    noisy: list[float], still: float | None, ratio: float | None
) -> None:
    assert Outcome(5, {"reward": judged(noisy, still)}, ALONE).ratio == pytest.approx(ratio)
    assert Outcome(5, {"reward": judged(noisy, still)}, {"reward": 3.0}).ratio == pytest.approx(ratio)
    turned = judged([-each for each in noisy], None if still is None else -still)
    assert Outcome(5, {"reward": turned}, {"reward": -1.0}).ratio == pytest.approx(ratio)
    twice = {"one": judged(noisy, still), "two": judged([9 * each for each in noisy], still and 9 * still, 9e-6)}
    assert Outcome(5, twice, {"one": 1.0, "two": 0.5}).ratio == pytest.approx(ratio)


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=4, max_size=9),
    st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_several_rewards_count_as_the_sum_that_is_trained(
    pairs: list[tuple[float, float]], weight: tuple[float, float]
) -> None:
    one, two = (list(each) for each in zip(*pairs, strict=True))
    deviations = [statistics.stdev(each[1:]) for each in (one, two)]
    assume(min(deviations) > 0.01)
    scaled = [w / deviation for w, deviation in zip(weight, deviations, strict=True)]
    total = [scaled[0] * a + scaled[1] * b for a, b in pairs]
    spread = statistics.stdev(total[1:])
    assume(spread > 0.01)
    outcome = Outcome(
        5,
        {"one": judged(one[1:], one[0]), "two": judged(two[1:], two[0])},
        {"one": weight[0], "two": weight[1]},
    )
    drop = total[0] - statistics.mean(total[1:])
    assert outcome.ratio == pytest.approx(min(max(drop / spread, -1), 1), abs=1e-6)
    assert not outcome.tied


# --- the whole rule on problems whose answer is known ---


Reward = Callable[[int, int, float, float], float]
"""The reward of a prompt's sibling, by its step, its noise and its draw, which is 0 if it is deterministic."""


def simulated_rewards(rule: AdaptiveSplits, plans: list[Any], iteration: int, reward: Reward) -> list[float]:
    draws, rewards = random.Random(f"{rule.seed} {iteration}"), []
    for prompt, planned in enumerate(plans):
        step = planned.last_split
        for child in range(planned.leaves):
            z = 0.0 if planned.still and child == 0 else draws.gauss(0, 1)
            rewards.append(reward(prompt, step, float(planned.active(step)), z))
    return rewards


def simulate(
    rule: AdaptiveSplits,
    reward: Reward | Mapping[str, Reward],
    iterations: int,
    most: float = math.inf,
    weights: Mapping[str, float] = ALONE,
) -> tuple[State, list[list[Any]]]:
    """Run the rule on eight prompts; several rewards see the same draws."""
    given = reward if isinstance(reward, Mapping) else {"reward": reward}
    schedule, state, history = Schedule(STEPS, rule, "splits"), rule.start(), []
    for iteration in range(iterations):
        ids = list(range(8 * iteration, 8 * iteration + 8))
        plans = plan_learned(schedule, state, iteration, ids, range(8), most)
        rewards = {name: simulated_rewards(rule, plans, iteration, each) for name, each in given.items()}
        topology, values = scored(plans, rewards)
        assert topology.rollout_rows <= rule.budget(8)
        state = rule.observe(state, range(8), topology, values, weights)
        history.append(plans)
    return state, history


def test_the_bandit_finds_the_step_that_spreads_most_per_row_and_starves_none() -> None:
    """Step 6 spreads four times as much as the others, whose trees cost from 64 rows (step 4) to 36 (step 8).

    So its chance is 0.05 + 0.75. In 240 draws a share has a deviation of 0.026: four of them are exceeded in less than
    one of 10,000 runs, of which there are 8. Each other step has 5%, so that one of them is never drawn with a chance
    of 0.95^240 < 1e-5. Where all spread alike, the cheapest step is the best.
    """
    for seed in range(8):
        rule = replace(RULE, seed=seed, drop=None)
        state, history = simulate(rule, lambda prompt, step, noise, z: z * (4.0 if step == 6 else 1.0), 60)
        drawn = Counter(planned.last_split for plans in history[30:] for planned in plans)
        assert abs(drawn[6] / 240 - 0.8) < 4 * 0.026
        assert set(drawn) == set(CANDIDATES)
        assert rule.chances(state) == pytest.approx([0.05, 0.05, 0.8, 0.05, 0.05])
        alike = {"mean": 1.0, "weight": 1.0}
        table = state["rewards"]["reward"]
        table = {**table, "steps": dict.fromkeys(table["steps"], alike)}
        state = {**state, "rewards": {"reward": table}}
        assert rule.chances(state) == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.8])
        assert rule.chances(rule.start()) == [0.2] * 5


def quadratic(start: float, drop: float) -> Reward:
    """R = l z - c l^2 z^2 at level l, ``start`` times the noise; its curvature c grows with the step."""

    def reward(prompt: int, step: int, noise: float, z: float) -> float:
        level = start * noise
        return level * z - drop * step / 6 * (level * z) ** 2

    return reward


def test_the_noise_is_what_all_trees_so_far_say() -> None:
    rule, seen = replace(RULE, drop=0.25), list[tuple[float, float]]()
    state, history = simulate(rule, quadratic(1.0, 0.25), 6)
    again = rule.start()
    for iteration, plans in enumerate(history):
        gains = [1 / (25 + (i + 1) / 2) for i in range(len(seen))]
        weights = [gain * math.prod(1 - later for later in gains[i + 1 :]) for i, gain in enumerate(gains)]
        start = math.prod(1 - gain for gain in gains)
        assert start + sum(weights) == pytest.approx(1)
        tried = math.exp(sum(w * math.log(noise) for w, (noise, _) in zip(weights, seen, strict=True)))
        ratio = start * 0.25 + sum(w * each for w, (_, each) in zip(weights, seen, strict=True))
        square = sum(w * each**2 for w, (_, each) in zip(weights, seen, strict=True))
        if ratio < -2 * math.sqrt(max(square - ratio**2, 0) / 2 / (25 + len(seen) / 2)):
            ratio = -ratio
        expected = tried * min(max(0.25 / ratio, 0.5), 2) if ratio > 0 else 2 * tried
        assert [planned.noise[0] for planned in plans] == [pytest.approx(expected, rel=1e-9)] * 8
        topology, values = scored(plans, {"reward": simulated_rewards(rule, plans, iteration, quadratic(1.0, 0.25))})
        outcomes = [observed(topology, values, ALONE, prompt) for prompt in range(8)]
        ratios = [0.0 if outcome is None else outcome.ratio or 0.0 for outcome in outcomes]
        seen += zip([planned.noise[0] for planned in plans], ratios, strict=True)
        again = rule.observe(again, range(8), topology, values, ALONE)
    assert again == state


def test_the_noise_ends_where_the_mean_has_dropped_by_the_fraction_from_wherever_it_starts() -> None:
    """With curvature c = drop * step / 6 the drop is c l^2 and the spread l sqrt(1 + 2 c^2 l^2).

    So for steps around 6 the fraction is ``drop`` where l is about 1, or somewhat more. With as many children at every
    step a tree's ratio has an error of 1/3, and the 320 trees of 40 iterations bring that of the mean to 0.02, a tenth
    of the drop of 0.2.
    """
    dearest = max(step + 1 + RULE.branches * below for step, below in zip(RULE.steps, RULE.remaining, strict=True))
    means = {}
    for start in (0.1, 10.0):
        logs = list[float]()
        for seed in range(3):
            rule = replace(RULE, seed=seed, explore=1.0, drop=0.2, rows=8 * dearest)
            state, _ = simulate(rule, quadratic(start, 0.2), 40)
            logs.append(math.log(start * (rule.noise(state) or 0.0)))
        assert max(map(abs, logs)) < math.log(1.75)
        means[start] = sum(logs) / len(logs)
    assert abs(means[10.0] - means[0.1]) < math.log(1.3)


def stepped(seed: int) -> Reward:
    """Whole numbers, one of whose edges lies anywhere above a tree's deterministic child."""
    draws, edge = random.Random(seed), [0.0]

    def reward(prompt: int, step: int, noise: float, z: float) -> float:
        if z == 0.0:  # a tree's first child
            edge[0] = draws.random()
        return math.floor(edge[0] + 0.15 * noise * z)

    return reward


def test_noise_that_a_reward_of_whole_steps_hardly_sees_rises() -> None:
    """Most siblings tie, and where they do not the drop is as large as the spread, up or down.

    80 trees that all tie raise the noise by 6. The geometric mean over seeds is looked at, as one run is off by a
    factor of 1.6.
    """
    logs = list[float]()
    for seed in range(12):
        rule = replace(RULE, seed=seed, branches=16, most=32)
        state, _ = simulate(rule, stepped(seed), 10)
        logs.append(math.log(rule.noise(state) or 0.0))
    assert sum(logs) / len(logs) > math.log(2.5)


def test_what_is_chosen_does_not_depend_on_the_units_of_rewards() -> None:
    """But for rounding; the units change while nothing is known yet, too."""

    def scaled(reward: Reward, unit: float, offset: float) -> Reward:
        return lambda prompt, step, noise, z: unit * reward(prompt, step, noise, z) + offset

    one, two = quadratic(1.0, 0.1), quadratic(0.5, 0.3)
    weights = {"one": 1.0, "two": 0.5}
    _, history = simulate(RULE, {"one": one, "two": two}, 12, weights=weights)
    _, again = simulate(RULE, {"one": scaled(one, 1e-3, 5e-3), "two": scaled(two, 300.0, 40.0)}, 12, weights=weights)
    _, turned = simulate(RULE, {"one": one, "two": scaled(two, -1.0, 0.0)}, 12, weights={"one": 1.0, "two": -0.5})
    for plans, others, signs in zip(history, again, turned, strict=True):
        assert [each.splits for each in plans] == [each.splits for each in others] == [each.splits for each in signs]
        noise = [each.noise[0] for each in plans]
        assert [each.noise[0] for each in others] == pytest.approx(noise, rel=1e-6)
        assert [each.noise[0] for each in signs] == pytest.approx(noise, rel=1e-6)


def test_only_the_rewards_of_the_run_are_remembered_by_their_weights_of_now() -> None:
    state, _ = simulate(RULE, {"one": quadratic(1.0, 0.1), "two": quadratic(1.0, 0.3)}, 3, weights={"one": 1, "two": 2})
    plans = plan_learned(Schedule(STEPS, RULE, "splits"), state, 3, range(24, 32), range(8), 10.0)
    draws = simulated_rewards(RULE, plans, 3, quadratic(1.0, 0.1))
    after = RULE.observe(state, range(8), *scored(plans, {"one": draws, "new": draws}), {"one": -0.5, "new": 1.0})
    assert {name: each["weight"] for name, each in after["rewards"].items()} == {"one": 0.5, "new": 1.0}
    seen = {name: sum(each["weight"] for each in entry["steps"].values()) for name, entry in after["rewards"].items()}
    assert seen["new"] == pytest.approx(8, rel=0.2)
    assert seen["one"] > 20


def test_all_rewards_have_a_say_in_the_noise() -> None:
    """One reward likes ten times the noise that the other does, and the noise ends between what each would have."""
    rewards, logs = {"bold": quadratic(0.3, 0.2), "careful": quadratic(3.0, 0.2)}, {}
    for name, bold, careful in (("bold", 1.0, 0.01), ("both", 1.0, 1.0), ("careful", 0.01, 1.0)):
        ended = list[float]()
        for seed in range(4):
            rule = replace(RULE, seed=seed, drop=0.2)
            state, _ = simulate(rule, rewards, 40, weights={"bold": bold, "careful": careful})
            ended.append(math.log(rule.noise(state) or 0.0))
        logs[name] = statistics.mean(ended)
    assert logs["careful"] + 0.5 < logs["both"] < logs["bold"] - 0.5


def drifting(change: float) -> Reward:
    """Rewards that no noise spoils, and that change by so much from one tree to the next."""
    trees = [0]

    def reward(prompt: int, step: int, noise: float, z: float) -> float:
        trees[0] += z == 0.0  # a tree's first child is the deterministic one
        return 0.1 * z + change * trees[0]

    return reward


def test_the_noise_does_not_rise_while_the_policy_without_it_gets_worse() -> None:
    """Nothing but that reins it in: the drop is 0 on average, which lets it rise to twice what was tried."""
    _, better = simulate(RULE, drifting(0.01), 60)
    worse_state, worse = simulate(RULE, drifting(-0.01), 60)
    first = RECENT // 8 + 1
    levels = [[plans[0].noise[0] for plans in history[:first]] for history in (worse, better)]
    assert levels[0] == pytest.approx(levels[1])
    tried = math.exp(worse_state["noise"]["log"])
    assert RULE.noise(worse_state) == pytest.approx(tried)
    assert worse[-1][0].noise[0] < better[-1][0].noise[0] / 4


@pytest.mark.parametrize(
    ("ratio", "ties", "noise"),
    [(0.1, 0.0, 1.0), (0.1, 0.5, 2 * 0.05 / 0.08), (0.1, 1.0, 2 * 0.05 / 0.06), (-0.1, 0.0, 1.0), (-0.03, 0.0, 4.0)],
)
def test_a_ratio_counts_by_its_size_where_it_is_clear_and_less_its_error_where_trees_tie(
    ratio: float, ties: float, noise: float
) -> None:
    """With ratios of deviation 0.2 and weight 50 the mean has an error of 0.02, two of which are clear."""
    learnt = {"log": math.log(2), "ratio": ratio, "square": 0.04 + ratio**2, "weight": 50.0}
    state = {**RULE.start(), "noise": learnt, "ties": {"mean": ties, "weight": 40.0}}
    assert RULE.drop == 0.05 and RULE.noise(state) == pytest.approx(noise)


@given(rewards=st.lists(st.floats(-10, 10), min_size=RECENT, max_size=3 * RECENT))
def test_the_recent_mean_is_that_of_weights_that_forget(rewards: list[float]) -> None:
    entry: dict[str, Any] = {"mean": 0.0, "variance": 0.0, "weight": 0.0, "best": None}
    means: list[float] = []
    for reward in rewards:
        _follow(entry, reward)
        means.append(entry["mean"])
    shares = [1 / min(i + 1, RECENT) for i in range(len(rewards))]
    weights = [share * math.prod(1 - later for later in shares[i + 1 :]) for i, share in enumerate(shares)]
    mean = sum(w * reward for w, reward in zip(weights, rewards, strict=True))
    variance = sum(w * (reward - mean) ** 2 for w, reward in zip(weights, rewards, strict=True))
    assert entry["mean"] == pytest.approx(mean, abs=1e-9)
    assert entry["variance"] == pytest.approx(variance, abs=1e-8)
    assert entry["mean"] - 1e-9 <= entry["best"] <= max(means[RECENT - 1 :]) + 1e-9
    worse = entry["best"] - entry["mean"] > 3 * math.sqrt(entry["variance"] / RECENT)
    assert _got_worse([{"weight": 0.5, "still": entry}]) == worse


def test_noise_never_leaves_its_limit() -> None:
    state, history = simulate(RULE, lambda prompt, step, noise, z: noise * z, 40, most=1.4)
    assert max(planned.noise[0] for plans in history for planned in plans) == 1.4
    # What is remembered is the noise that was tried, so it does not run away beyond the limit.
    assert state["noise"]["log"] < math.log(1.4)


def test_prompts_that_tie_get_fewest_children_and_others_more() -> None:
    spread = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0]
    rule = replace(RULE, drop=None)
    state, history = simulate(rule, lambda prompt, step, noise, z: 3 + spread[prompt] * z, 60)
    children = [sum(plans[prompt].leaves for plans in history[30:]) / 30 for prompt in range(8)]
    assert max(children[:2]) < 4 < children[2] < children[4] < children[6]
    flat = replace(rule, by_prompt=False)
    _, even = simulate(flat, lambda prompt, step, noise, z: 3 + spread[prompt] * z, 60)
    means = [sum(plans[prompt].leaves for plans in even[30:]) / 30 for prompt in range(8)]
    assert max(means) < 1.3 * min(means)
    assert state["prompts"].keys() == set(map(str, range(8)))


def test_what_is_remembered_survives_json_to_the_bit_and_is_not_changed_in_hindsight() -> None:
    state, _ = simulate(RULE, lambda prompt, step, noise, z: noise * z, 5)
    again = json.loads(json.dumps(state))
    assert again == state
    before = json.dumps(state)
    plans = plan_learned(Schedule(STEPS, RULE, "splits"), again, 5, range(40, 48), range(8), 10.0)
    assert plans == plan_learned(Schedule(STEPS, RULE, "splits"), state, 5, range(40, 48), range(8), 10.0)
    rewards = [float(i % 3) for i in range(sum(planned.leaves for planned in plans))]
    assert RULE.observe(state, range(8), *scored(plans, {"reward": rewards}), ALONE) != state
    assert json.dumps(state) == before


def test_a_rule_that_does_not_learn_is_planned_as_ever() -> None:
    schedule = Schedule(5, FixedSplits((1,), (2,)))
    assert plan_ahead(schedule, 0, [4, 5]) == [schedule.plan(0, 4), schedule.plan(0, 5)]
    with pytest.raises(ValueError, match="FixedSplits does not learn"):
        plan_learned(schedule, {}, 0, [4], [4], 1.0)


# --- recipes ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree.sde": "all"}, "sde is 'splits', not 'all'"),
        ({"tree.branches": [4]}, "takes one number of branches"),
        ({"tree.branches": 2}, "from 3 to 4 children, and 2 on average cannot be"),
        ({"tree.adaptive.most": 8}, "from 3 to 8 children, and 16 on average"),
        ({"sampler.eta": [0.3]}, "starts from one noise level, not a list"),
        ({"tree.adaptive.rows": 100}, "adaptive.rows: 4 prompts take up to"),
    ],
)
def test_recipes_refuse_what_cannot_adapt(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", {"tree.splits": "adaptive", **changes})


def test_the_plan_states_the_budget_and_keeps_to_it() -> None:
    planned = plan("quickstart_single+adaptive")
    assert planned.budget is not None
    assert planned.rollout_rows <= planned.budget.most
    assert 0.95 * planned.budget.most < planned.budget.mean <= planned.budget.most
    single = plan("quickstart_single")
    assert single.budget is None
    schedule = make_schedule(single.recipe)
    cheapest = min(grow([schedule.plan(i, i)]).rollout_rows for i in range(100))
    assert planned.budget.most == 4 * cheapest
    few = plan("quickstart_single+adaptive", {"tree.branches": 4}).budget  # 3 children of the first step take more
    assert few is not None and few.most == 4 * (7 + 3 * 13)


# --- runs ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def adaptive(model: Path, **changes: Any) -> dict[str, Any]:
    overrides = small(model, tree__branches=4, tree__steps=6, run__iterations=4, run__checkpoint_every=2, **changes)
    del overrides["tree.splits"]
    return overrides


RECIPE = "quickstart_single+adaptive"


def remembered(run: Path, iteration: int = 4) -> Mapping[str, Any]:
    state = json.loads((run / f"checkpoints/iteration_{iteration:06d}/state.json").read_text())
    return dict(state["splits"])


def test_a_run_adapts_and_goes_on_to_the_byte(model: Path, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, adaptive(model))
    train(recipe, output=tmp_path / "whole")
    train(load_recipe(RECIPE, adaptive(model) | {"run.iterations": 2}), output=tmp_path / "two")
    train(recipe, output=tmp_path / "two", resume=True)
    rows = metrics(tmp_path / "whole")
    assert (tmp_path / "two/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert remembered(tmp_path / "two") == remembered(tmp_path / "whole") != remembered(tmp_path / "whole", 2)
    whole, two = weights(tmp_path / "whole"), weights(tmp_path / "two")
    assert all(torch.equal(whole[name], two[name]) for name in whole)
    budget = plan(recipe).budget
    assert budget is not None
    assert all(row["rows/rollout"] <= budget.most for row in rows)
    assert rows[0]["split/eta"] == 0.7 != rows[-1]["split/eta"]
    assert all(2 <= row["split/step"] <= 4 and 3 <= row["split/children"] <= 8 for row in rows)
    assert sum(row["edges/trained"] for row in rows) <= sum(row["leaves/scored"] - 2 for row in rows)


def test_two_processes_remember_what_one_does(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = adaptive(model, batch__prompts=3, scoring__max_invalid=1.0)
    read_picky(monkeypatch.setattr)
    train(RECIPE, overrides, output=tmp_path / "one")
    for members in (1, 2):
        output = tmp_path / f"two_{members}"
        command = [
            str(SCRIPT), "2", "train", RECIPE, *arguments(overrides),
            f"batch.processes_per_prompt={members}", "--output", str(output), "--no-report",
        ]  # fmt: skip
        done = Python(*command)
        assert done.ended() == 0, done.out + done.err
        one, two = remembered(tmp_path / "one"), remembered(output)
        assert two["rewards"].keys() == one["rewards"].keys()
        steps = [(each["steps"], two["rewards"][name]["steps"]) for name, each in one["rewards"].items()]
        for ours, theirs in [*steps, (one["prompts"], two["prompts"])]:
            assert theirs.keys() == ours.keys()
            for name, entry in ours.items():
                assert theirs[name] == pytest.approx(entry, rel=1e-3)


def test_another_rules_memory_is_refused(model: Path, tmp_path: Path) -> None:
    overrides = adaptive(model) | {"run.iterations": 2}
    train("quickstart_single", overrides, output=tmp_path / "run")
    assert "splits" not in json.loads((tmp_path / "run/checkpoints/iteration_000002/state.json").read_text())
    changed = adaptive(model) | {"tree.splits": "adaptive"}
    train("quickstart_single", changed, output=tmp_path / "run", resume=True, allow=["tree.splits"])
    assert remembered(tmp_path / "run")["rewards"]


LEARNER = """
    from pydantic import BaseModel

    from branchtree.core.schedule import Branching
    from branchtree.plugins import hookimpl


    class Config(BaseModel, extra="forbid"):
        first: int = 0


    class Marching:
        def __init__(self, first):
            self.first = first

        def factors(self, iteration, prompt):
            return {self.first: 3}

        def start(self):
            return {"next": self.first, "seen": []}

        def choose(self, state, iteration, prompts, indices):
            return [Branching({state["next"]: 3}, {state["next"]: 2.0}) for _ in prompts]

        def observe(self, state, indices, topology, values, weights):
            (name,) = weights
            best = weights[name] * float(values[name].value[-1].max())
            return {"next": state["next"] + 1, "seen": [*state["seen"], best]}


    @hookimpl
    def register_splits(register):
        register("marching", build=lambda config, section, seed: Marching(config.first), config=Config, summary="one")
"""


def test_a_strangers_rule_may_learn_too(tmp_path: Path, guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)
    plug(fake_distribution(tmp_path, "acme-learner", {"acme": "acme_learner"}, {"acme_learner": LEARNER}))
    changes = {
        "tree.steps": 6, "tree.split_rule": {"name": "marching", "first": 1}, "tree.sde": "splits",
        "run.iterations": 3, "run.checkpoint_every": 3, "run.sample_every": None, "callbacks": [], "evaluation": None,
    }  # fmt: skip
    train("guest", changes, output=tmp_path / "run")
    assert [row["split/step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]
    assert [row["split/eta"] for row in metrics(tmp_path / "run")] == [2 * load_recipe("guest").sampler.level] * 3
    state = remembered(tmp_path / "run", 3)
    assert state["next"] == 4
    assert len(state["seen"]) == 3
