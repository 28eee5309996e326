"""Forward objectives against readings of their papers, on random trees, and their draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import forward_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Forest, batches, forests, make_plan, thorough
from torch import Tensor, nn

from branchtree import load_recipe
from branchtree.core.cost import count
from branchtree.core.credit import Credit, CreditRule, assign_credit
from branchtree.core.draws import LEAST_SIGMA, DrawRule, ForwardRows
from branchtree.core.forward import ForwardBatch, noise_samples
from branchtree.core.grid import time_grid
from branchtree.core.noise import NoiseSource, Purpose
from branchtree.core.pruning import extreme_leaves, trainable_leaves
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.sharing import cut
from branchtree.core.tree import BranchTree, Topology, grow, grow_shares
from branchtree.recipe.build import make_forward_loss
from branchtree.training.forward import ForwardObjective
from branchtree.training.limits import RowLimit
from branchtree.training.objective import Earlier, OptimiserStep, Policies, UpdateRecord
from branchtree.training.update import Gradient, partition

CPU = torch.device("cpu")
LATENT = (2, 3)
KINDS = ("nft", "awm", "vgrpo", "crd")
POWERS = {"none": 0, "sigma": 1, "sigma_squared": 2}
few = settings(thorough, max_examples=20)


class Toy(nn.Module):
    """What a small model predicts, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        for name, size in {"matrix": (3, 3), "level": (3,), "prompt": (3,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(size, generator=source, dtype=torch.float64)))

    def forward(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        along = [each.double().view(-1, 1, 1) for each in (sigma, prompt + 1)]
        return (latents.double() @ self.matrix + along[0] * self.level + along[1] * self.prompt).tanh() * 2

    def one(self, state: Tensor, sigma: float, prompt: int) -> Tensor:
        """The same for the reference."""
        return self(state[None], torch.tensor([sigma], dtype=torch.float64), torch.tensor([prompt]))[0]

    def gradient(self) -> Tensor:
        return torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in self.parameters()])


class Engine:
    """What a gradient needs of an engine."""

    joint = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def discard(self) -> None:
        self.model.zero_grad()


def objective(loss: dict[str, Any], sigmas: Tensor, prediction: str = "velocity") -> ForwardObjective:
    recipe = load_recipe("quickstart", {f"loss.{key}": value for key, value in loss.items()})
    rule = make_forward_loss(recipe)
    assert rule is not None
    section = recipe.loss
    draws = DrawRule(3, section.draws, section.share_draws, section.times, section.time_shift)
    return ForwardObjective(section, rule, draws, sigmas, prediction, CPU)  # type: ignore[arg-type]


def grown(topology: Topology, seed: int) -> BranchTree:
    """A tree with random leaves."""
    source = torch.Generator().manual_seed(seed)
    states = [torch.randn(topology.width(depth), *LATENT, generator=source, dtype=torch.float64)
              for depth in topology.depths]  # fmt: skip
    sigmas = time_grid(topology.steps, 3.0) * 0.9
    return BranchTree(topology, sigmas, tuple(states), tuple(torch.zeros(len(each)) for each in states))


def credited(topology: Topology, seed: int) -> Credit:
    """Advantages of leaves, some of them without one; a dozen at most are kept, for the reference is slow."""
    source = torch.Generator().manual_seed(seed)
    width = topology.width(topology.steps)
    advantage = torch.randn(width, generator=source, dtype=torch.float64) * 3
    advantage[torch.rand(width, generator=source) < 0.2] = 0
    kept = torch.zeros(width, dtype=torch.bool)
    kept[torch.randperm(width, generator=source)[:12]] = True
    keep = trainable_leaves(topology, kept)
    zeros = tuple(torch.zeros(topology.width(depth), dtype=torch.float64) for depth in topology.depths[:-1])
    return Credit({}, torch.ones(width, dtype=torch.bool), {}, (*zeros, advantage), keep)


def read_rows(
    topology: Topology, tree: BranchTree, leaves: list[int], ids: list[int], credit: Credit, made: ForwardObjective
) -> list[reference.Row]:
    """The rows of some leaves, one after the other, each with the noise that its address has."""
    found = []
    rule = made.draws
    for leaf in leaves:
        prompt = int(topology.leaf_root[leaf])
        plan = topology.plans[prompt]
        split = max(plan.last_split, 0)
        node = leaf
        for depth in range(topology.steps, split, -1):
            node = int(topology.parent[depth][node])
        family = node - topology.span(prompt, split).start
        own = leaf - topology.span(prompt, topology.steps).start
        source = {"leaf": own, "siblings": family, "group": 0}[rule.share]
        for draw in range(rule.count):
            noise = NoiseSource(rule.seed, 7).normal(Purpose.FORWARD, ids[prompt], draw, [source], LATENT)[0].double()
            one = ForwardRows(7, *(torch.tensor([value]) for value in (topology.steps, leaf, prompt, ids[prompt], draw,
                              source, 0)), torch.zeros(1), torch.zeros(1))  # fmt: skip
            sigma = float(rule.draw(one, tree.sigmas, LATENT)[0])
            group = (prompt, family if rule.share == "siblings" else 0, draw)
            advantage = float(credit.advantages[-1][leaf].float())
            found.append(reference.Row(tree.leaves[leaf], noise, sigma, prompt, advantage, group))
    return found


def differentiated(
    made: ForwardObjective, tree: BranchTree, work: ForwardRows, model: Toy, earlier: Earlier | None, rows: int | None
) -> UpdateRecord:
    """Leave the gradient of the sum of all terms in the model."""
    model.zero_grad()
    limit, engine = RowLimit("batch.update_rows", rows), Engine(model)
    step = OptimiserStep(tree, Policies(model, None), first=earlier is None)
    gradient = Gradient(made, engine, limit, 1, step, earlier)  # type: ignore[arg-type]
    gradient.add(work)
    return gradient.finish(0)


keys = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "error": st.sampled_from(["velocity", "adaptive"]),
        "error_weight": st.sampled_from(["none", "sigma", "sigma_squared"]),
        "share_draws": st.sampled_from(["leaf", "siblings", "group"]),
        "times": st.sampled_from(["uniform", "stratified", "logit_normal", "grid"]),
        "time_shift": st.sampled_from([1.0, 3.0]),
        "draws": st.integers(1, 3),
        "beta": st.sampled_from([0.1, 1.0, 2.0]),
        "advantage_range": st.sampled_from([1.0, 5.0]),
        "clip_range": st.sampled_from([1e-3, 0.3]),
    }
)
predictions = st.sampled_from(["velocity", "velocity", "noise", "v"])


def as_read(loss: dict[str, Any], prediction: str) -> reference.Keys:
    weight = POWERS[loss["error_weight"]]
    return reference.Keys(loss["kind"], loss["error"], weight, loss["beta"], loss["advantage_range"],
                          loss["clip_range"], prediction)  # fmt: skip


@given(plans=batches(), seed=st.integers(0, 2**32 - 1), loss=keys, prediction=predictions)
@few
def test_an_objective_is_what_its_paper_states(
    plans: tuple[TreePlan, ...], seed: int, loss: dict[str, Any], prediction: str
) -> None:
    """The losses and their gradient, in an iteration's first step and in a later one, however batches are cut."""
    topology, ids = grow(plans), [11 * i + 5 for i in range(len(plans))]
    tree, credit, model = grown(topology, seed), credited(topology, seed), Toy(seed)
    made = objective(loss, tree.sigmas, prediction)
    if made.rule.whole_groups:
        credit = replace(credit, regularised=True)
    work = made.work(credit, topology, ids, 7)
    rows = read_rows(topology, tree, torch.nonzero(credit.trained(topology)[-1])[:, 0].tolist(), ids, credit, made)
    assert len(work) == work.edges == len(rows)
    if not rows:
        return
    before = Toy(seed)
    with torch.no_grad():
        earlier = made.earlier(tree, work, Policies(before, None))
    cuts = random.Random(seed)
    for old in (None, earlier):
        if old is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
        seen = differentiated(made, tree, work, model, old, cuts.choice([None, 1, 3]))
        found, gradient = torch.cat(seen.loss).double(), model.gradient()
        model.zero_grad()
        expected = reference.loss(rows, model.one, before.one, as_read(loss, prediction))
        sum(expected, start=torch.zeros(())).backward()
        scale = max(float(model.gradient().abs().max()), 1.0)
        assert found.tolist() == pytest.approx([float(value.detach()) for value in expected], rel=1e-6, abs=1e-6)
        assert float((gradient - model.gradient()).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("kind", ["awm", "vgrpo"])
def test_in_the_first_step_the_ratio_is_1_to_the_bit(kind: str) -> None:
    topology = grow([make_plan(3, {0: 4})])
    tree, credit, model = grown(topology, 1), credited(topology, 1), Toy(1)
    made = objective({"kind": kind}, tree.sigmas)
    seen = differentiated(made, tree, made.work(credit, topology, [0], 7), model, None, None)
    assert torch.equal(torch.cat(seen.first_deviation), torch.zeros(len(torch.cat(seen.loss))).double())


@pytest.mark.parametrize(
    ("draws", "later", "average"), [(1, True, True), (3, True, False), (3, False, True), (3, False, False)]
)
def test_awm_is_flow_policy_optimisation(draws: int, later: bool, average: bool) -> None:
    """The loss and its gradient: always if each draw has a ratio; of averaged draws, of one draw or in a first step."""
    topology = grow([make_plan(3, {0: 4}), make_plan(3, {0: 3})])
    tree, credit, before, model = grown(topology, 2), credited(topology, 2), Toy(2), Toy(2)
    loss = {"kind": "awm", "draws": draws, "times": "uniform", "clip_range": 0.05}
    made = objective(loss, tree.sigmas)
    work = made.work(credit, topology, [3, 8], 7)
    with torch.no_grad():
        earlier = made.earlier(tree, work, Policies(before, None)) if later else None
        for parameter in model.parameters() if later else ():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    seen = differentiated(made, tree, work, model, earlier, None)
    found, gradient = torch.cat(seen.loss).double(), model.gradient()
    model.zero_grad()
    leaves = torch.nonzero(credit.trained(topology)[-1])[:, 0].tolist()
    rows = read_rows(topology, tree, leaves, [3, 8], credit, made)
    samples = [rows[i : i + draws] for i in range(0, len(rows), draws)]
    expected = torch.stack([reference.flow_policy_loss(each, model.one, before.one, 0.05, average) for each in samples])
    (draws * expected.sum()).backward()
    torch.testing.assert_close(found.unflatten(0, (-1, draws)).mean(1), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, model.gradient(), rtol=1e-6, atol=1e-6)
    clipped = torch.cat(seen.clipped)
    assert bool(clipped.any()) == later and not bool(clipped.all())


def test_a_lone_sample_is_weighted_matching() -> None:
    """One leaf and one draw: the first gradient is the advantage times that of the flow-matching loss."""
    topology = grow([make_plan(2, {})])
    tree, model = grown(topology, 3), Toy(3)
    credit = replace(credited(topology, 3), advantages=(torch.zeros(1), torch.zeros(1), torch.tensor([1.7])),
                     keep=trainable_leaves(topology, torch.ones(1, dtype=torch.bool)))  # fmt: skip
    made = objective({"kind": "awm", "draws": 1}, tree.sigmas)
    work = made.work(credit, topology, [0], 7)
    differentiated(made, tree, work, model, None, None)
    found = model.gradient()
    sigma, noise = made.draws.draw(work, tree.sigmas, LATENT)
    state = (1 - sigma.double()) * tree.leaves + sigma.double() * noise.double()
    model.zero_grad()
    (1.7 * (model(state, sigma, torch.zeros(1)) - (noise.double() - tree.leaves)).square().mean()).backward()
    torch.testing.assert_close(found, model.gradient(), rtol=1e-6, atol=1e-8)


def test_averaged_weights_are_what_is_compared_with() -> None:
    """Under ``old_policy: ema`` a step's old predictions, and a centred objective's means, are the average's."""
    topology = grow([make_plan(3, {0: 3, 1: 2})])
    tree, credit, model, average = grown(topology, 5), credited(topology, 5), Toy(5), Toy(6)
    credit = replace(credit, regularised=True)
    loss = {"kind": "crd", "old_policy": "ema", "draws": 2, "clip_range": 1e-3, "error_weight": "none", "beta": 1.0,
            "advantage_range": 5.0, "error": "velocity"}  # fmt: skip
    made = objective(loss, tree.sigmas)
    work = made.work(credit, topology, [4], 7)
    limit: Any = RowLimit("batch.update_rows", 4)
    step = OptimiserStep(tree, Policies(model, None, average))
    gradient = Gradient(made, Engine(model), limit, 1, step)  # type: ignore[arg-type]
    gradient.add(work)
    seen = gradient.finish(0)
    found = model.gradient()
    model.zero_grad()
    leaves = torch.nonzero(credit.trained(topology)[-1])[:, 0].tolist()
    rows = read_rows(topology, tree, leaves, [4], credit, made)
    sum(reference.loss(rows, model.one, average.one, as_read(loss, "velocity")), start=torch.zeros(())).backward()
    torch.testing.assert_close(found, model.gradient(), rtol=1e-6, atol=1e-8)
    assert (seen.rows, seen.rescored_rows) == (len(work), 3 * len(work))


# --- draws ---


def drawn(rule: DrawRule, topology: Topology, ids: list[int]) -> tuple[ForwardRows, Tensor, Tensor]:
    width = topology.width(topology.steps)
    advantages = tuple(torch.ones(topology.width(depth), dtype=torch.float64) for depth in topology.depths)
    keep = trainable_leaves(topology, torch.ones(width, dtype=torch.bool))
    rows = rule.rows(Credit({}, keep[-1], {}, advantages, keep), topology, ids, 2)
    return rows, *rule.draw(rows, time_grid(topology.steps, 3.0), LATENT)


def pairs(rows: ForwardRows, sigma: Tensor, noise: Tensor) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """The pair of each (prompt address, leaf among all, draw)."""
    named = zip(rows.prompt_id.tolist(), rows.node.tolist(), rows.draw.tolist(), strict=True)
    return {name: (s, *n) for name, s, n in zip(named, sigma.tolist(), noise.flatten(1).tolist(), strict=True)}


@pytest.mark.parametrize(("share", "sources"), [("leaf", 8 + 3), ("siblings", 4 + 1), ("group", 2)])
def test_leaves_share_their_draws_as_the_key_says(share: Any, sources: int) -> None:
    topology = grow([make_plan(5, {0: 2, 1: 2, 2: 2}), make_plan(5, {1: 3})])
    rows, sigma, noise = drawn(DrawRule(0, 3, share), topology, [4, 9])
    found = pairs(rows, sigma, noise)
    assert len(found) == 3 * 11 and len(set(found.values())) == 3 * sources
    if share == "siblings":
        families = [{found[4, leaf, 0] for leaf in (2 * i, 2 * i + 1)} for i in range(4)]
        assert all(len(family) == 1 for family in families)


@given(plans=batches(), share=st.sampled_from(["leaf", "siblings", "group"]), seed=st.integers(0, 99))
@few
def test_draws_do_not_depend_on_what_else_is_drawn(plans: tuple[TreePlan, ...], share: Any, seed: int) -> None:
    """Prompts alone, some rows, and the shares of several processes have the pairs that all rows have together."""
    topology, rule, ids = grow(plans), DrawRule(seed, 2, share), list(range(20, 20 + len(plans)))
    rows, sigma, noise = drawn(rule, topology, ids)
    chosen = torch.nonzero(torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.5)[:, 0]
    some = rule.draw(rows.select(chosen), time_grid(topology.steps, 3.0), LATENT)
    assert torch.equal(some[0], sigma[chosen]) and torch.equal(some[1], noise[chosen])
    last = len(plans) - 1
    alone, alone_sigma, alone_noise = drawn(rule, topology.select(range(last, last + 1)), ids[last:])
    moved = alone.within(topology, last)
    mine = rows.prompt == last
    assert torch.equal(moved.node, rows.node[mine]) and torch.equal(moved.prompt, rows.prompt[mine])
    assert torch.equal(alone_sigma, sigma[mine]) and torch.equal(alone_noise, noise[mine])
    members = min(3, *(plan.leaves for plan in plans))
    whole = pairs(rows, sigma, noise)
    seen: list[tuple[float, ...]] = []
    for member in range(members):
        share_topology = grow_shares([cut(plan, members)[member] for plan in plans])
        owned = rows.owned(topology, share_topology)
        level, base = rule.draw(owned, time_grid(topology.steps, 3.0), LATENT)
        assert torch.equal(share_topology.leaf_root[owned.node], owned.prompt)
        seen += pairs(owned, level, base).values()
    assert sorted(seen) == sorted(whole.values())


def test_another_iteration_has_other_draws() -> None:
    topology = grow([make_plan(3, {0: 4})])
    rule = DrawRule(0, 2)
    rows, sigma, noise = drawn(rule, topology, [1])
    later = rule.draw(replace(rows, iteration=3), time_grid(3, 3.0), LATENT)
    assert not bool((later[0] == sigma).any()) and not bool((later[1] == noise).any())


@pytest.mark.parametrize("times", ["uniform", "stratified", "logit_normal", "grid"])
def test_noise_levels_are_those_of_their_distribution(times: Any) -> None:
    """Against the distribution function, by Kolmogorov's test at about 1 in 10,000; strata hold one draw each."""
    topology, grid, count = grow([make_plan(4, {0: 200})]), time_grid(4, 3.0), 5
    rows, sigma, _ = drawn(DrawRule(1, count, times=times, shift=2.0), topology, [0])
    if times == "grid":
        shares = torch.stack([(sigma == level).double().mean() for level in grid[:-1]])
        assert float(shares.sum()) == 1 and float((shares - 0.25).abs().max()) < 0.06
        return
    unshifted = sigma.double() / (2 - sigma.double())
    place = torch.special.ndtr(torch.logit(unshifted)) if times == "logit_normal" else unshifted
    ordered, steps = place.sort().values, torch.arange(1, len(place) + 1) / len(place)
    assert float((ordered - steps).abs().max()) < 2.2 / len(place) ** 0.5
    strata = (place * count).floor().long().clamp(0, count - 1)
    assert (strata == rows.draw).double().mean() == pytest.approx(0.2 if times == "uniform" else 1.0, abs=0.06)


def test_no_level_is_below_the_least_or_above_the_grid() -> None:
    topology = grow([make_plan(4, {0: 50})])
    rule = DrawRule(1, 20, shift=0.01)
    rows, _, _ = drawn(rule, topology, [0])
    sigma, _ = rule.draw(rows, time_grid(4, 3.0) * 0.7, LATENT)
    assert float(sigma.min()) == pytest.approx(LEAST_SIGMA) and float(sigma.max()) < 0.7


# --- which leaves ---


@given(forest=forests(), kind=st.sampled_from(KINDS), kl=st.booleans(), draws=st.integers(1, 3))
@few
def test_the_leaves_that_are_trained_have_a_score_and_something_to_learn(
    forest: Forest, kind: str, kl: bool, draws: int
) -> None:
    """Those with an advantage; of nft and crd all of a group with one, and under a KL all that have a score."""
    whole_groups = kind in {"nft", "crd"}
    rule = CreditRule(regularised=kl, draws=draws, whole_groups=whole_groups)
    scores = {"r": Scores(forest.reward_tensor.float(), forest.valid_tensor)}
    topology = forest.topology
    credit = assign_credit(topology, forest.edge_log_prob, scores, {"r": 1.0}, rule, 0, 1)
    advantage, root = credit.advantages[-1].tolist(), topology.leaf_root.tolist()
    apart = {prompt for prompt, value, valid in zip(root, advantage, forest.valid, strict=True) if valid and value}
    expected = [
        leaf
        for leaf, (prompt, value, valid) in enumerate(zip(root, advantage, forest.valid, strict=True))
        if valid and (kl or value or (whole_groups and prompt in apart))
    ]
    rows = DrawRule(0, draws).rows(credit, topology, range(topology.prompts), 0)
    assert rows.node.tolist() == [leaf for leaf in expected for _ in range(draws)]
    assert rows.draw.tolist() == [draw for _ in expected for draw in range(draws)]


def test_pruning_leaves_out_leaves() -> None:
    topology = grow([make_plan(4, {0: 6})])
    prune = partial(_best_and_worst, keep=1)
    rule = CreditRule(draws=2, prune=prune)
    values = torch.tensor([0.3, 0.9, 0.1, 0.4, 0.5, 0.2])
    flat = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    scores = {"r": Scores(values, torch.ones(6, dtype=torch.bool))}
    credit = assign_credit(topology, flat, scores, {"r": 1.0}, rule, 0, 1)
    assert torch.nonzero(credit.trained(topology)[-1])[:, 0].tolist() == [1, 2]
    assert count(topology.plans, rule, 0).gradient_rows == 2 * 2


def _best_and_worst(topology: Topology, values: Any, iteration: int, keep: int) -> Any:
    return extreme_leaves(topology, values.value[-1], values.valid[-1], keep)


@given(plans=batches(), steps=st.integers(1, 3))
@few
def test_rows_are_dealt_out_to_steps_once_each(plans: tuple[TreePlan, ...], steps: int) -> None:
    topology = grow(plans)
    rows, _, _ = drawn(DrawRule(0, 2), topology, list(range(len(plans))))
    parts = partition(rows, steps, 0, 1, range(len(plans)), 0)
    names = [name for part in parts for name in zip(part.node.tolist(), part.draw.tolist(), strict=True)]
    assert sorted(names) == sorted(zip(rows.node.tolist(), rows.draw.tolist(), strict=True))


# --- what the target is ---


@pytest.mark.parametrize("prediction", ["velocity", "noise", "v"])
def test_what_is_predicted_exactly_has_no_error(prediction: Any) -> None:
    """And the scale turns an error of the prediction into one of the clean sample."""
    source = torch.Generator().manual_seed(0)
    clean, noise, off = (torch.randn(5, *LATENT, generator=source, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    noised = noise_samples(clean, noise, sigma, prediction)
    for i in range(5):
        guess = reference.clean_sample(noised.states[i], noised.target[i], float(sigma[i]), prediction)
        torch.testing.assert_close(guess, clean[i], rtol=1e-6, atol=1e-6)
        wrong = reference.clean_sample(noised.states[i], noised.target[i] + off[i], float(sigma[i]), prediction)
        torch.testing.assert_close(clean[i] - wrong, noised.scale[i] * off[i], rtol=1e-6, atol=1e-6)
    recipe = load_recipe("quickstart", {"loss.kind": "nft", "loss.error": "velocity"})
    rule = make_forward_loss(recipe)
    assert rule is not None
    batch = ForwardBatch(noised, noised.target, noised.target, torch.ones(5), torch.zeros(5))
    assert torch.equal(rule(batch).loss, torch.zeros(5, dtype=torch.float64))
