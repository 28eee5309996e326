"""Trees grown in parts: what each part holds and owns, and that the parts together are the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import reference
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.credit import Credit, CreditRule, assign_credit
from branchtree.core.families import Families, collect_families, gather
from branchtree.core.gathering import gather_levels, gather_scores, owned_nodes
from branchtree.core.gaussian import DanceSde
from branchtree.core.grid import time_grid
from branchtree.core.noise import (
    CorrelatedSiblings,
    IndependentSiblings,
    NoiseSource,
    Purpose,
    Siblings,
    SimplexSiblings,
)
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import DrawnSplits, Schedule, TreePlan
from branchtree.core.scores import Scores
from branchtree.core.sharing import TreeShare, cut
from branchtree.core.solvers import Solver
from branchtree.core.tree import BranchTree, Topology, grow, grow_shares, indices_in
from branchtree.recipe.build import make_prune
from branchtree.recipe.schema import PruningSection

LATENT = (2, 3)


@dataclass(frozen=True)
class Split:
    """A forest, and its prompts' trees in as many parts as the smallest allows, cut anywhere."""

    forest: Forest
    parts: tuple[tuple[TreeShare, ...], ...]  # per process, of each prompt

    @property
    def whole(self) -> Topology:
        return self.forest.topology

    @property
    def topologies(self) -> list[Topology]:
        return [grow_shares(parts) for parts in self.parts]


@st.composite
def splits(draw: st.DrawFn) -> Split:
    forest = draw(strategies.forests())
    count = draw(st.integers(1, min(plan.leaves for plan in forest.plans)))
    numbers = random.Random(draw(st.integers(0, 2**32 - 1)))
    by_prompt = []
    for plan in forest.plans:
        ends = [0, *sorted(numbers.sample(range(1, plan.leaves), count - 1)), plan.leaves]
        by_prompt.append([TreeShare(plan, range(a, b)) for a, b in pairwise(ends)])
    return Split(forest, tuple(zip(*by_prompt, strict=True)))


fewer = settings(strategies.thorough, max_examples=40)


# What a part is.


@given(splits())
@strategies.thorough
def test_a_part_holds_what_leads_to_its_leaves_and_owns_what_starts_with_one(split: Split) -> None:
    roots = split.forest.nodes()
    for parts, part in zip(split.parts, split.topologies, strict=True):
        mine = {id(leaf) for root, each in zip(roots, parts, strict=True)
                for place, leaf in enumerate(reference.leaves(root)) if place in each.leaves}  # fmt: skip
        places, owned = indices_in(split.whole, parts), owned_nodes(part)
        for depth in part.depths:
            level = reference.level(roots, depth)
            held = [node for node in level if any(id(leaf) in mine for leaf in reference.leaves(node))]
            assert places[depth].tolist() == [node.place for node in held]
            assert part.root[depth].tolist() == [node.prompt for node in held]
            assert owned[depth].tolist() == [id(reference.leaves(node)[0]) in mine for node in held]
            if depth:
                above = reference.level(roots, depth - 1)
                assert [above[places[depth - 1][parent]] for parent in part.parent[depth]] == [n.parent for n in held]
            for prompt in range(part.prompts):
                span = part.span(prompt, depth)
                assert list(span) == [row for row, node in enumerate(held) if node.prompt == prompt]


@given(splits())
@strategies.thorough
def test_every_node_is_owned_once(split: Split) -> None:
    for depth in split.whole.depths:
        owners = torch.zeros(split.whole.width(depth), dtype=torch.int64)
        for parts, part in zip(split.parts, split.topologies, strict=True):
            owners[indices_in(split.whole, parts)[depth][owned_nodes(part)[depth]]] += 1
        assert bool((owners == 1).all())


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16])
def test_cuts_are_even(parts: int) -> None:
    sizes = [len(part.leaves) for part in cut(make_plan(6, {0: 4, 2: 4}), parts)]
    assert sum(sizes) == 16 and max(sizes) - min(sizes) <= 1


def test_a_tree_is_not_cut_into_more_parts_than_leaves() -> None:
    plan = make_plan(4, {0: 2})
    with pytest.raises(ValueError, match="2 leaves cannot be cut into 3 shares"):
        cut(plan, 3)
    for leaves in (range(1, 1), range(1, 3), range(0, 2, 2)):
        with pytest.raises(ValueError, match="not consecutive leaves of a tree's 2"):
            TreeShare(plan, leaves)


def test_rows_of_the_parts_are_the_trees_and_what_is_computed_twice() -> None:
    # Widths 1 2 2 4 4 4: of the first four steps' 9 nodes, the root and its chain down to the cut are shared.
    plan = make_plan(5, {0: 2, 2: 2})
    assert [grow_shares([part]).rollout_rows for part in cut(plan, 2)] == [1 + 1 + 1 + 2 + 2] * 2
    # Cut through a family: the middle part's node of depth 1 is its neighbours' too.
    uneven = [TreeShare(plan, range(1)), TreeShare(plan, range(1, 3)), TreeShare(plan, range(3, 4))]
    assert [grow_shares([part]).rollout_rows for part in uneven] == [5, 1 + 2 + 2 + 2 + 2, 5]


# Rollouts.


def velocity(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
    """Rounds alike in batches of any size: no function that is vectorised in blocks, and no sum."""
    bias = (prompt + 1).view(-1, 1, 1)
    return 0.5 * latents * (1 + 0.25 * latents.clamp(-1, 1)) / bias - sigma.view(-1, 1, 1)


def grown(topology: Topology, siblings: Siblings, solver: Solver = "euler", rows: int | None = None) -> BranchTree:
    ids = [7 + prompt for prompt in range(topology.prompts)]
    initial = torch.cat([NoiseSource(5, 0).normal(Purpose.INITIAL, prompt, 0, [0], LATENT) for prompt in ids])
    sampler = Sampler(DanceSde(0.7), siblings, time_grid(topology.steps, 3.0), solver=solver)
    return rollout(velocity, sampler, topology, initial, NoiseSource(42, 3), ids, max_rows=rows)


def assert_rows_of(whole: BranchTree, part: BranchTree) -> None:
    for depth, places in enumerate(indices_in(whole.topology, part.topology.shares)):
        assert torch.equal(part.states[depth], whole.states[depth][places])
        torch.testing.assert_close(part.log_prob[depth], whole.log_prob[depth][places], rtol=1e-6, atol=1e-6)


SIBLINGS = (CorrelatedSiblings(4.0), IndependentSiblings(), SimplexSiblings())


@given(splits(), st.sampled_from(SIBLINGS), st.sampled_from([None, 1, 3]))
@fewer
def test_a_part_is_rows_of_the_whole_rollout(split: Split, siblings: Siblings, rows: int | None) -> None:
    whole = grown(split.whole, siblings)
    for part in split.topologies:
        assert_rows_of(whole, grown(part, siblings, rows=rows))


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_a_part_follows_a_shortened_continuation(solver: Solver) -> None:
    schedule = Schedule(12, DrawnSplits(2, 5, 8, seed=1), sde="splits", continuation=3)
    plans = [schedule.plan(0, prompt) for prompt in range(3)]
    assert any(plan.skipped for plan in plans)
    whole = grown(grow(plans), IndependentSiblings(), solver)
    parts = [grow_shares([cut(plan, 3)[place] for plan in plans]) for place in range(3)]
    for part in parts:
        assert_rows_of(whole, grown(part, IndependentSiblings(), solver))


def test_a_share_of_a_prompt_is_the_same_beside_other_prompts() -> None:
    plans = [make_plan(5, {0: 2, 2: 3}), make_plan(5, {1: 4}), make_plan(5, {0: 5})]
    shares = [cut(plan, 3)[1] for plan in plans]
    together, alone = grown(grow_shares(shares), SIBLINGS[0]), grown(grow_shares(shares[:1]), SIBLINGS[0])
    selected = together.topology.select(range(1))
    assert [share.leaves for share in selected.shares] == [share.leaves for share in alone.topology.shares]
    for first, second in zip(
        (*selected.parent, *selected.root), (*alone.topology.parent, *alone.topology.root), strict=True
    ):
        assert torch.equal(first, second)
    assert torch.equal(together.leaves[: len(alone.leaves)], alone.leaves)


# Credit and gradients.


def scores_of(forest: Forest) -> Scores:
    values = forest.reward_tensor.float()
    leaves = torch.arange(len(values))
    reasons = {leaf: f"leaf {leaf}" for leaf in leaves[~forest.valid_tensor].tolist()}
    return Scores(values, forest.valid_tensor, raw=2 * values, details={"place": leaves.float()}, reasons=reasons)


def rows_of(scores: Scores, places: Tensor) -> Scores:
    here = {int(place): row for row, place in enumerate(places)}
    return Scores(
        values=scores.values[places],
        valid=scores.valid[places],
        raw=None if scores.raw is None else scores.raw[places],
        details={name: figure[places] for name, figure in scores.details.items()},
        reasons={here[leaf]: reason for leaf, reason in scores.reasons.items() if leaf in here},
    )


RULES = [
    CreditRule(prune=make_prune(PruningSection(**section)))
    for section in ({}, {"kind": "parent_top1"}, {"kind": "extreme", "count": 1}, {"kind": "depth", "size": 2})
]


def credit_of(topology: Topology, log_prob: Sequence[Tensor], scores: Scores, rule: CreditRule) -> Credit:
    return assign_credit(topology, log_prob, {"r": scores}, {"r": 1.0}, rule, 0, 6)


@given(splits(), st.sampled_from(RULES))
@fewer
def test_credit_from_joined_parts_is_the_wholes(split: Split, rule: CreditRule) -> None:
    forest, scores = split.forest, scores_of(split.forest)
    places = [indices_in(split.whole, parts) for parts in split.parts]
    # What a part says of a node that it does not own is not read.
    levels = [
        [
            level[at].where(mine, torch.nan)
            for level, at, mine in zip(forest.edge_log_prob, where, owned_nodes(part), strict=True)
        ]
        for where, part in zip(places, split.topologies, strict=True)
    ]
    joined = gather_levels(split.whole, split.topologies, levels)
    assert all(torch.equal(a, b) for a, b in zip(joined, forest.edge_log_prob, strict=True))
    all_scores = gather_scores(split.whole, split.topologies, [rows_of(scores, where[-1]) for where in places])
    assert all_scores.details["place"].tolist() == list(range(len(scores)))
    assert all_scores.reasons == scores.reasons
    first = credit_of(split.whole, forest.edge_log_prob, scores, rule)
    second = credit_of(split.whole, joined, all_scores, rule)
    for a, b in zip((*first.advantages, *first.keep), (*second.advantages, *second.keep), strict=True):
        assert torch.equal(a, b)


@given(splits(), st.sampled_from(RULES), st.integers(0, 3))
@fewer
def test_credit_is_each_prompts_own(split: Split, rule: CreditRule, first: int) -> None:
    """To the bit, however prompts are taken together; and so are the edges that are trained."""
    whole, scores, log_prob = split.whole, scores_of(split.forest), split.forest.edge_log_prob
    cuts = sorted({0, min(first, whole.prompts), whole.prompts})
    ranges = [range(a, b) for a, b in pairwise(cuts)]
    credits, families = [], []
    for prompts in ranges:
        blocks = [whole.block(prompts, depth) for depth in whole.depths]
        own = [level[block.start : block.stop] for level, block in zip(log_prob, blocks, strict=True)]
        leaves = torch.arange(blocks[-1].start, blocks[-1].stop)
        credits.append(credit_of(whole.select(prompts), own, scores.rows(leaves), rule))
        families.append(credits[-1].families(whole.select(prompts)).within(whole, prompts.start))
    together, alone = Credit.concatenate(credits), credit_of(whole, log_prob, scores, rule)
    for a, b in zip(
        (*together.advantages, *together.keep, *together.values["r"].value, together.valid, together.rewards["r"]),
        (*alone.advantages, *alone.keep, *alone.values["r"].value, alone.valid, alone.rewards["r"]),
        strict=True,
    ):
        assert torch.equal(a, b)
    expected = alone.families(whole)
    edges = {
        edge
        for each in families
        for edge in zip(
            each.edge_depth.tolist(),
            each.parent[each.family].tolist(),
            each.prompt[each.family].tolist(),
            each.child.tolist(),
            each.advantage.tolist(),
            strict=True,
        )
    }
    assert edges == set(
        zip(
            expected.edge_depth.tolist(),
            expected.parent[expected.family].tolist(),
            expected.prompt[expected.family].tolist(),
            expected.child.tolist(),
            expected.advantage.tolist(),
            strict=True,
        )
    )


def gradient(tree: BranchTree, families: Families) -> Tensor:
    """Of the sum of the edges' advantage-weighted densities, in double precision, by two weights of a policy."""
    weights = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    batch = gather(tree, families, torch.device("cpu"))
    latents = batch.latents.double()
    who = families.prompt.double().view(-1, 1, 1)
    prediction = (latents * weights[0]).sin() + weights[1] * (1 + who) * batch.sigma.double().view(-1, 1, 1)
    sampler = Sampler(DanceSde(0.7), IndependentSiblings(), tree.sigmas)
    active = torch.ones(len(families), dtype=torch.bool)
    spread = sampler.transition(latents, prediction, families.depth, active).rows(batch.family)
    (spread.log_prob(batch.following.double()) * batch.advantage.double()).sum().backward()
    assert weights.grad is not None
    return weights.grad


@given(splits(), st.sampled_from(RULES))
@fewer
def test_gradients_of_the_parts_add_up(split: Split, rule: CreditRule) -> None:
    credit = credit_of(split.whole, split.forest.edge_log_prob, scores_of(split.forest), rule)
    families = collect_families(split.whole, credit.advantages, credit.keep)
    own = [families.owned(split.whole, part) for part in split.topologies]
    assert sum(part.edges for part in own) == families.edges
    if families.edges == 0:
        return
    whole = gradient(grown(split.whole, SIBLINGS[0]), families)
    trees = [grown(part, SIBLINGS[0]) for part in split.topologies]
    added = sum(gradient(tree, part) for tree, part in zip(trees, own, strict=True) if part.edges)
    torch.testing.assert_close(added, whole, rtol=1e-6, atol=1e-9 * float(whole.abs().max()))


def test_a_family_of_two_owners_is_a_row_in_each() -> None:
    plan: TreePlan = make_plan(3, {0: 4})
    whole = grow([plan])
    flat = [torch.zeros(whole.width(depth)) for depth in whole.depths]
    scores = Scores(torch.tensor([0.1, 0.9, 0.4, 0.2]), torch.ones(4, dtype=torch.bool))
    credit = credit_of(whole, flat, scores, CreditRule())
    families = collect_families(whole, credit.advantages, credit.keep)
    first, second = (families.owned(whole, grow_shares([part])) for part in cut(plan, 2))
    for own, rewards in ((first, [0, 1]), (second, [2, 3])):
        assert own.depth.tolist() == [0, 1, 1] and own.parent.tolist() == [0, 0, 1]
        assert own.child.tolist() == [0, 1, 0, 1]
        torch.testing.assert_close(own.advantage[:2], credit.advantages[1][rewards].float())
