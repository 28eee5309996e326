"""The whole way from rewards to trained edges against the reference, and the counts that follow from it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Keep, Node
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.advantages import ESTIMATORS
from branchtree.core.cost import Cost, count
from branchtree.core.credit import Credit, CreditRule, assign_credit
from branchtree.core.families import collect_families
from branchtree.core.noise import Purpose
from branchtree.core.schedule import PRESET_SPLITS, FixedSplits, Schedule, SlidingWindow, TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.recipe.build import make_prune
from branchtree.recipe.schema import PruningSection

ITERATION = 45
NAMES = {estimator: name for name, estimator in ESTIMATORS.items()}


def scores(rewards: Tensor, valid: Tensor) -> Scores:
    return Scores(rewards.float(), valid)


def credit_of(
    forest: Forest,
    rule: CreditRule | None = None,
    pruning: PruningSection | None = None,
    by_name: Mapping[str, Scores] | None = None,
    weights: Mapping[str, float] | None = None,
    dimensions: int = 1,
) -> Credit:
    return assign_credit(
        forest.topology,
        forest.edge_log_prob,
        by_name or {"reward": scores(forest.reward_tensor, forest.valid_tensor)},
        weights or {"reward": 1.0},
        replace(rule or CreditRule(), prune=make_prune(pruning or PruningSection())),
        ITERATION,
        dimensions,
    )


def in_float32(forest: Forest) -> Forest:
    """Rewards as adapters give them, so that both readings start from the same numbers."""
    return forest.with_rewards(torch.tensor(forest.rewards).tolist())


def reference_keep(roots: list[Node], pruning: PruningSection) -> Keep:
    if pruning.kind == "parent_top1":
        return reference.parent_top1(roots)
    if pruning.kind == "extreme":
        return reference.extreme(roots, pruning.count)
    if pruning.kind == "depth":
        return reference.outside_depth_window(roots, pruning.size, pruning.every, pruning.stop, ITERATION)
    return reference.keep_all(roots)


rules = st.builds(
    CreditRule,
    beta=st.sampled_from([0.0, 1.0]),
    scale=st.sampled_from(["mean", "sum", "standardised"]),
    estimator=st.sampled_from(list(ESTIMATORS.values())),
    clip=st.sampled_from([1.0, 5.0]),
    regularised=st.booleans(),
)
prunings = st.builds(
    PruningSection,
    kind=st.sampled_from(["none", "parent_top1", "extreme", "depth"]),
    count=st.integers(1, 4),
    size=st.integers(1, 3),
    every=st.just(30),
    stop=st.integers(0, 6),
)


@given(strategies.forests(ties=False).map(in_float32), rules, prunings)
@strategies.thorough
def test_trained_edges_and_advantages_equal_the_reference(
    forest: Forest, rule: CreditRule, pruning: PruningSection
) -> None:
    """The order is fuse, normalise, prune: pruning changes no advantage."""
    roots = forest.nodes()
    reference.fuse_all(roots, rule.beta, rule.scale, 2)
    reference.assign_advantages(roots, NAMES[rule.estimator], rule.eps, rule.clip)
    credit = credit_of(forest, rule, pruning, dimensions=2)
    for depth in forest.topology.depths:
        expected = [node.advantage for node in reference.level(roots, depth)]
        assert credit.advantages[depth].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    families = credit.families(forest.topology)
    expected_families = reference.families(roots, reference_keep(roots, pruning), rule.regularised)
    assert families.depth.tolist() == [parent.depth for parent, _ in expected_families]
    assert families.parent.tolist() == [parent.place for parent, _ in expected_families]
    assert families.child.tolist() == [child.place for _, kids in expected_families for child in kids]


def two_rewards(forest: Forest) -> dict[str, Scores]:
    """A second reward on another scale, with a failure of its own."""
    numbers = random.Random(3)
    second = torch.tensor([100 * numbers.gauss(0, 1) for _ in forest.rewards])
    valid = torch.tensor([numbers.random() > 0.1 for _ in forest.rewards])
    return {
        "first": scores(forest.reward_tensor, forest.valid_tensor),
        "second": scores(second.where(valid, torch.tensor(torch.nan)), valid),
    }


def reference_advantages(forest: Forest, rewards: Tensor, valid: Tensor) -> list[list[float]]:
    masked = replace(forest, rewards=tuple(rewards.tolist()), valid=tuple(valid.tolist()))
    roots = masked.nodes()
    reference.fuse_all(roots, 1.0)
    reference.assign_advantages(roots, "depth", 1e-8, 5.0)
    return [[node.advantage for node in reference.level(roots, depth)] for depth in masked.topology.depths]


@given(strategies.forests(ties=False).map(in_float32), st.sampled_from(["advantages", "rewards"]))
@strategies.thorough
def test_several_rewards_are_added_as_asked(forest: Forest, combine: str) -> None:
    """Each normalised by itself and then added with its weight; or the raw rewards first."""
    given_scores, weights = two_rewards(forest), {"first": 0.5, "second": -2.0}
    rule = CreditRule(combine=combine)  # type: ignore[arg-type]
    credit = credit_of(forest, rule, by_name=given_scores, weights=weights)
    valid = given_scores["first"].valid & given_scores["second"].valid
    assert torch.equal(credit.valid, valid)
    first, second = (given_scores[name].values.double().where(valid, 0.0) for name in ("first", "second"))
    if combine == "rewards":
        expected = reference_advantages(forest, 0.5 * first - 2 * second, valid)
    else:
        parts = [reference_advantages(forest, part, valid) for part in (first, second)]
        expected = [[0.5 * a - 2 * b for a, b in zip(one, two, strict=True)] for one, two in zip(*parts, strict=True)]
    for depth in forest.topology.depths:
        assert credit.advantages[depth].tolist() == pytest.approx(expected[depth], rel=1e-5, abs=1e-5)


@given(strategies.forests(), rules, prunings)
@strategies.thorough
def test_masked_rewards_leave_no_trace(forest: Forest, rule: CreditRule, pruning: PruningSection) -> None:
    """NaN and infinities in masked places, against zeros there; and a failed leaf's own edges are not trained."""
    poisoned = credit_of(forest, rule, pruning)
    zeros = torch.where(forest.valid_tensor, forest.reward_tensor, 0.0)
    clean = credit_of(forest, rule, pruning, {"reward": scores(zeros, forest.valid_tensor)})
    for mine, other in ((poisoned.advantages, clean.advantages), (poisoned.keep, clean.keep)):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    families = collect_families(forest.topology, poisoned.advantages, poisoned.keep)
    nodes = forest.nodes()
    levels = [reference.level(nodes, depth) for depth in forest.topology.depths]
    for depth, child in zip(families.edge_depth.tolist(), families.child.tolist(), strict=True):
        assert reference.valid_leaves(levels[depth][child])
        assert levels[depth][child].stochastic


def test_a_value_that_is_not_finite_is_masked_even_if_called_valid() -> None:
    forest = Forest((make_plan(2, {0: 4}),), ((0.0,), (0.0,) * 4, (0.0,) * 4), (0.0,) * 4, (True,) * 4)
    values = torch.tensor([1.0, math.nan, math.inf, 3.0])
    credit = credit_of(forest, by_name={"reward": Scores(values, torch.ones(4, dtype=torch.bool))})
    assert credit.valid.tolist() == [True, False, False, True]
    assert credit.rewards["reward"].tolist() == [1, 0, 0, 3]
    assert credit.advantages[1].tolist() == pytest.approx([-math.sqrt(0.5), 0, 0, math.sqrt(0.5)])


def test_scores_that_cancel_keep_their_rounding() -> None:
    """Two rewards of size 1000 that add up to rounding are a tie, though their sum is small."""
    plan = make_plan(2, {0: 4})
    forest = Forest((plan,), ((0.0,), (0.0,) * 4, (0.0,) * 4), (0.0,) * 4, (True,) * 4)
    first = torch.tensor([1000.0, 1001.0, 1002.0, 1003.0])
    second = torch.nextafter(first, torch.tensor([0.0, 2000.0, 0.0, 2000.0]))
    given_scores = {name: scores(reward, forest.valid_tensor) for name, reward in (("a", first), ("b", second))}
    rule = CreditRule(combine="rewards")
    assert credit_of(forest, rule, None, given_scores, {"a": 1.0, "b": -1.0}).advantages[1].tolist() == [0] * 4
    assert float(credit_of(forest, rule, None, given_scores, {"a": 1.0, "b": -0.5}).advantages[1].abs().min()) > 0.3


def test_a_tie_has_no_say_in_what_is_pruned() -> None:
    """A reward whose spread is rounding ranks no leaf, beside one that does."""
    plan = make_plan(3, {0: 4})
    forest = Forest((plan,), ((0.0,), *[(0.0,) * 4] * 3), (0.0,) * 4, (True,) * 4)
    rounding = torch.nextafter(torch.full((4,), 0.5), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    told_apart = scores(torch.tensor([0.1, 0.2, 0.3, 0.4]), forest.valid_tensor)
    by_name = {"close": scores(rounding, forest.valid_tensor), "apart": told_apart}
    rule = PruningSection(kind="extreme", count=1)
    both = credit_of(forest, None, rule, by_name, {"close": -5.0, "apart": 1.0})
    alone = credit_of(forest, None, rule, {"apart": told_apart}, {"apart": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(both.keep, alone.keep, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both.advantages, alone.advantages, strict=True))


def test_a_reward_of_weight_0_neither_masks_nor_counts() -> None:
    forest = Forest((make_plan(2, {0: 4}),), ((0.0,), (0.0,) * 4, (0.0,) * 4), (0.0,) * 4, (True,) * 4)
    good = scores(torch.tensor([0.1, 0.2, 0.3, 0.4]), forest.valid_tensor)
    failed = scores(torch.full((4,), math.nan), torch.zeros(4, dtype=torch.bool))
    for combine in ("advantages", "rewards"):
        rule = CreditRule(combine=combine)  # type: ignore[arg-type]
        both = credit_of(forest, rule, by_name={"failed": failed, "good": good}, weights={"failed": 0.0, "good": 1.0})
        alone = credit_of(forest, rule, by_name={"good": good}, weights={"good": 1.0})
        assert bool(both.valid.all())
        assert torch.equal(both.advantages[1], alone.advantages[1])


def test_advantages_are_clipped_before_they_are_weighted() -> None:
    """One leaf of 64 stands out: its advantage is 63 / 8 = 7.875, cut to 5."""
    forest = Forest((make_plan(2, {0: 64}),), ((0.0,), (0.0,) * 64, (0.0,) * 64), (1.0,) + (0.0,) * 63, (True,) * 64)
    assert float(credit_of(forest).advantages[1][0]) == 5
    assert float(credit_of(forest, weights={"reward": 2.0}).advantages[1][0]) == 10
    unclipped = credit_of(forest, CreditRule(clip=100.0)).advantages[1]
    assert float(unclipped[0]) == pytest.approx(63 / 8)


@given(strategies.forests(), st.randoms(use_true_random=False), rules, prunings)
@strategies.thorough
def test_credit_does_not_depend_on_batch_mates_or_order(
    forest: Forest, shuffler: random.Random, rule: CreditRule, pruning: PruningSection
) -> None:
    chosen = shuffler.sample(range(len(forest.plans)), shuffler.randint(1, len(forest.plans)))
    whole, part = credit_of(forest, rule, pruning), credit_of(forest.take(chosen), rule, pruning)
    for depth in forest.topology.depths:
        place = torch.cat([torch.tensor(forest.topology.span(prompt, depth)) for prompt in chosen])
        torch.testing.assert_close(part.advantages[depth], whole.advantages[depth][place], rtol=1e-6, atol=1e-6)
        if depth:
            assert torch.equal(part.keep[depth], whole.keep[depth][place])


# Counts.


def cost_of(plan: TreePlan, prompts: int = 1, estimator: str = "depth", **pruning: object) -> Cost:
    prune = make_prune(PruningSection(**pruning))  # type: ignore[arg-type]
    return count([plan] * prompts, CreditRule(estimator=ESTIMATORS[estimator], prune=prune), 0)


def preset(name: str) -> TreePlan:
    return make_plan(20, dict.fromkeys(PRESET_SPLITS[name], 2))


@pytest.mark.parametrize(
    ("plan", "nodes", "edges", "leaves", "rows"),
    [
        (preset("dense"), 219, 218, 16, 203),
        (preset("mixed"), 185, 184, 16, 169),
        (preset("sparse"), 151, 150, 16, 135),
        (make_plan(20, {0: 16}), 321, 320, 16, 305),
    ],
    ids=["dense", "mixed", "sparse", "trajectories"],
)
def test_the_table_of_counts(plan: TreePlan, nodes: int, edges: int, leaves: int, rows: int) -> None:
    one, three = cost_of(plan), cost_of(plan, prompts=3)
    assert (one.nodes, one.edges, one.leaves, one.rollout_rows) == (nodes, edges, leaves, rows)
    assert (three.nodes, three.edges, three.leaves, three.rollout_rows) == (
        3 * nodes,
        3 * edges,
        3 * leaves,
        3 * rows,
    )
    assert three.gradient_rows == 3 * one.gradient_rows
    assert one.nodes_per_leaf == pytest.approx(nodes / leaves)


def test_independent_trajectories_cost_320_rows() -> None:
    assert cost_of(make_plan(20, {}), prompts=16).rollout_rows == 320


@pytest.mark.parametrize(
    ("pruning", "gradient_rows", "trained_edges"),
    [
        # Stochastic steps 0 to 18: parents 1 + 3 * 2 + 3 * 4 + 3 * 8 + 9 * 16.
        ({"kind": "none"}, 187, 3 * 2 + 3 * 4 + 3 * 8 + 10 * 16),
        # Nine stochastic steps after the last split lose 8 parents each.
        ({"kind": "parent_top1"}, 187 - 72, 202 - 72),
        ({"kind": "extreme", "count": 4}, 187 - 72, 202 - 72),
        # Steps 9 to 12: 8 parents of 16 edges, then 3 times 16 of 16.
        ({"kind": "depth"}, 187 - 8 - 48, 202 - 64),
    ],
    ids=["none", "parent_top1", "extreme", "depth"],
)
def test_gradient_rows_of_dense(pruning: dict[str, object], gradient_rows: int, trained_edges: int) -> None:
    cost = cost_of(preset("dense"), **pruning)
    assert (cost.gradient_rows, cost.trained_edges) == (gradient_rows, trained_edges)
    assert cost.rollout_rows == 203  # pruning never touches the rollout


def windowed(splits: dict[int, int], start: int) -> TreePlan:
    window = SlidingWindow(4, start, 30, 15)
    return Schedule(20, FixedSplits(tuple(splits), tuple(splits.values())), window).plan(0, 0)


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        (make_plan(20, {0: 16}), 1172),
        (preset("dense"), 764),
        (windowed(dict.fromkeys(PRESET_SPLITS["dense"], 2), 9), 392),
        (windowed({9: 16}, 9), 317),
        (make_plan(20, dict.fromkeys((6, 9, 12, 15), 2), []), 158),
        (make_plan(20, {12: 16}, []), 128),
        (make_plan(20, {15: 16}, []), 83),
        (make_plan(20, {18: 16}, []), 38),
    ],
    ids=["trajectories", "dense", "mix", "mixgrpo", "four splits", "one at 12", "one at 15", "one at 18"],
)
def test_rows_per_prompt_with_a_trained_row_counted_three_times(plan: TreePlan, rows: int) -> None:
    """The published comparison of variants: rollout rows plus three times the gradient rows."""
    cost = cost_of(plan)
    assert cost.rollout_rows + 3 * cost.gradient_rows == rows


@pytest.mark.parametrize("kind", ["none", "parent_top1", "extreme", "depth"])
@pytest.mark.parametrize("estimator", ["depth", "leaf", "sibling"])
@pytest.mark.parametrize("name", ["dense", "mixed", "sparse", "mix"])
def test_costs_equal_the_reference(kind: str, estimator: str, name: str) -> None:
    plan = windowed(dict.fromkeys(PRESET_SPLITS["mixed"], 2), 9) if name == "mix" else preset(name)
    numbers = random.Random(1)
    roots = [reference.plant(i, plan.factors, plan.stochastic, plan.trained) for i in range(2)]
    reference.number(roots)
    for leaf in reference.level(roots, 20):
        leaf.reward = numbers.gauss(0, 1)
    reference.fuse_all(roots, 1.0)
    reference.assign_advantages(roots, estimator, 1e-8, 5.0)
    pruning = PruningSection(kind=kind)  # type: ignore[arg-type]
    cost = count([plan] * 2, CreditRule(estimator=ESTIMATORS[estimator], prune=make_prune(pruning)), ITERATION)
    families = reference.families(roots, reference_keep(roots, pruning))
    assert cost.gradient_rows == len(families)
    assert cost.trained_edges == sum(len(children) for _, children in families)


@given(strategies.batches(), rules, prunings)
@strategies.thorough
def test_ragged_costs_equal_the_reference(
    plans: tuple[TreePlan, ...], rule: CreditRule, pruning: PruningSection
) -> None:
    numbers = random.Random(2)
    roots = [reference.plant(i, plan.factors, plan.stochastic, plan.trained) for i, plan in enumerate(plans)]
    reference.number(roots)
    for leaf in reference.level(roots, plans[0].steps):
        leaf.reward = numbers.gauss(0, 1)
    reference.fuse_all(roots, rule.beta, rule.scale)
    reference.assign_advantages(roots, NAMES[rule.estimator], rule.eps, rule.clip)
    cost = count(plans, replace(rule, prune=make_prune(pruning)), ITERATION)
    widths = [len(reference.level(roots, depth)) for depth in range(plans[0].steps + 1)]
    assert (cost.nodes, cost.edges, cost.leaves) == (sum(widths), sum(widths) - len(plans), widths[-1])
    assert cost.rollout_rows == sum(widths[:-1])
    assert cost.gradient_rows == len(reference.families(roots, reference_keep(roots, pruning), rule.regularised))


def test_a_mix_window_trains_only_its_own_steps_and_the_splits() -> None:
    plan = windowed(dict.fromkeys(PRESET_SPLITS["dense"], 2), 12)
    topology = grow([plan])
    log_prob = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    rewards = Scores(torch.arange(16.0).square(), torch.ones(16, dtype=torch.bool))
    credit = assign_credit(topology, log_prob, {"r": rewards}, {"r": 1.0}, CreditRule(), 0, dimensions=1)
    families = collect_families(topology, credit.advantages, credit.keep)
    assert sorted(set(families.depth.tolist())) == [0, 3, 6, 9, 12, 13, 14, 15]


def test_noise_purposes_are_part_of_every_address() -> None:
    """Their numbers are hashed into the noise, so they are as fixed as a file format."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "INITIAL": 0,
        "EDGE": 1,
        "SHARED": 2,
        "PERMUTATION": 3,
        "RESAMPLING": 4,
        "FORWARD": 5,
        "TIME": 6,
    }
