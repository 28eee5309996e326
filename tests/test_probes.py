"""Probes: where their trajectories lead, what they cost, and that as a baseline they leave the gradient unbiased."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import strategies
import torch
from broken_rewards import Compares, Config
from forked import Python
from hypothesis import given
from hypothesis import strategies as st
from picky_digits import read_picky
from reference import Node
from safetensors.torch import load_file
from strategies import Forest, make_plan
from test_forward_runs import opened
from torch import Tensor
from training_runs import arguments, metrics, small, spreads, weights

from branchtree import load_recipe, plan, train
from branchtree.core.fusion import NodeValues, fuse
from branchtree.core.gathering import gather_levels
from branchtree.core.gaussian import DanceSde
from branchtree.core.grid import time_grid
from branchtree.core.noise import IndependentSiblings, NoiseSource
from branchtree.core.probes import Probes, probe_advantages, probe_differences, weighted_sum
from branchtree.core.rollout import Sampler, VelocityFunction, forwards, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.sharing import cut
from branchtree.core.tree import BranchTree, grow, grow_shares
from branchtree.errors import RecipeError
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import check_learns, make_kernel
from branchtree.training.iteration import Iteration, iterate
from branchtree.training.metrics import gather_metrics
from branchtree.training.probing import refuse_group_rewards

SCRIPT = Path(__file__).with_name("picky_digits.py")


def velocity(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
    return torch.sin(latents + prompt[:, None]) + sigma[:, None]


def sampled(plans: list[TreePlan], solver: str = "euler") -> tuple[BranchTree, Sampler]:
    sampler = Sampler(DanceSde(0.8), IndependentSiblings(), time_grid(plans[0].steps, 3.0), solver=solver)  # type: ignore[arg-type]
    initial = torch.randn(len(plans), 2, generator=torch.Generator().manual_seed(1))
    return rollout(velocity, sampler, grow(plans), initial, NoiseSource(5, 0), range(len(plans))), sampler


FIRST = (True, *(False,) * 5)
COARSE = TreePlan((2, 1, 1, 1, 1, 1), FIRST, FIRST, skipped=frozenset({2, 4}))
TWO = (True, False, False, True, *(False,) * 3)
JOINED = TreePlan((2, 1, 1, 3, 1, 1, 1), TWO, TWO, frozenset({1, 2, 4}))
SECOND, THIRD = (False, True, *(False,) * 5), (False, False, True, *(False,) * 4)
PLANS = {
    "ragged": [make_plan(5, {0: 2, 2: 2}), make_plan(5, {1: 3}, stochastic=[])],
    "nothing to probe": [make_plan(3, {}, stochastic=[]), make_plan(3, {0: 2}, stochastic=[])],
    "skipping": [COARSE, make_plan(6, {1: 2}, stochastic=[])],
    "joined": [JOINED, make_plan(7, {1: 2}, stochastic=[4])],
    "adaptive": [
        TreePlan((1, 3, *(1,) * 5), SECOND, SECOND, noise=(1.0, 1.7, *(1.0,) * 5), still=True),
        TreePlan((1, 1, 4, *(1,) * 4), THIRD, THIRD, frozenset({3, 5}), noise=(0.6,) * 7, still=True),
    ],
}


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
@pytest.mark.parametrize("max_rows", [None, 3])
def test_a_probe_ends_where_its_state_leads_without_noise(
    plans: list[TreePlan], solver: str, max_rows: int | None
) -> None:
    tree, sampler = sampled(plans, solver)
    topology, probes = tree.topology, Probes.of(tree.topology)
    latents = probes.sample(velocity, sampler, tree, torch.device("cpu"), max_rows)
    row, rows = 0, 0
    for depth in range(topology.steps):
        for node in range(topology.width(depth)):
            plan_of_node = topology.plans[int(topology.root[depth][node])]
            if not plan_of_node.stochastic[depth]:
                continue
            kept = [step for step in range(depth, topology.steps) if step not in plan_of_node.skipped]
            alone = replace(sampler, sigmas=sampler.sigmas[[*kept, topology.steps]])
            path = grow([make_plan(len(kept), {}, stochastic=[])])
            prompt = topology.root[depth][node]

            def one(latents: Tensor, sigma: Tensor, _: Tensor, prompt: Tensor = prompt) -> Tensor:
                return velocity(latents, sigma, prompt.expand(len(latents)))

            state = tree.states[depth][node : node + 1]
            expected = rollout(one, alone, path, state, NoiseSource(0, 0), [0]).leaves
            torch.testing.assert_close(latents[row : row + 1], expected)
            row, rows = row + 1, rows + len(kept)
    assert (len(probes), probes.paths.rollout_rows) == (row, rows)
    assert forwards(probes.paths, 1) == rows


def test_scores_come_back_to_the_nodes_that_were_probed() -> None:
    probes = Probes.of(grow(PLANS["ragged"]))
    found = probes.by_node(torch.arange(len(probes)).float(), torch.arange(len(probes)) != 1)
    flat = torch.cat(found)
    assert flat[flat.isfinite()].tolist() == [0.0, *range(2, len(probes))]
    probed = [(depth, int(node)) for depth, chosen in enumerate(probes.nodes) for node in chosen]
    assert all(math.isnan(found[d][n]) == (i == 1) for i, (d, n) in enumerate(probed))


def test_of_a_shared_tree_each_node_is_probed_by_one_process() -> None:
    plans = PLANS["ragged"]
    shares = [grow_shares([cut(each, 3)[member] for each in plans]) for member in range(3)]
    whole, probes = grow(plans), [Probes.of(share) for share in shares]
    assert sum(map(len, probes)) == len(Probes.of(whole))

    def worths(of: Probes) -> tuple[Tensor, ...]:
        """By depth, prompt and index in the whole tree, which are what a node's probe depends on."""
        numbers = [
            100.0 * depth + 10 * root + of.topology.shares[root].held[depth][node - of.topology.span(root, depth).start]
            for depth, chosen in enumerate(of.nodes)
            for node, root in zip(chosen.tolist(), of.topology.root[depth][chosen].tolist(), strict=True)
        ]
        return of.by_node(torch.tensor(numbers), torch.ones(len(of), dtype=torch.bool))

    gathered = gather_levels(whole, shares, [worths(own) for own in probes])
    for level, expected in zip(gathered, worths(Probes.of(whole)), strict=True):
        torch.testing.assert_close(level, expected, equal_nan=True)


# --- advantages ---


def worth(node: Node) -> float | None:
    """What a node is worth if it goes on without noise; None where that is not known."""
    if node.is_leaf:
        return node.value
    (child, *_) = node.children
    return node.probe if child.stochastic else worth(child)  # type: ignore[attr-defined, no-any-return]


def differences(node: Node, returns: str, before: float = 0.0) -> None:
    """Put the naive difference into each node below one."""
    node.difference = before  # type: ignore[attr-defined]
    for child in node.children:
        own = before
        if child.stochastic:
            found = worth(child) if returns == "step" else child.value
            probe = node.probe  # type: ignore[attr-defined]
            own = 0.0 if found is None or probe is None else found - probe
        differences(child, returns, own)


@given(strategies.forests(), st.sampled_from(["leaf", "step"]), st.integers(0, 2**16), st.sampled_from([0.0, 0.3]))
@strategies.thorough
def test_advantages_equal_a_naive_reading(forest: Forest, returns: str, seed: int, masked: float) -> None:
    topology, numbers, roots = forest.topology, random.Random(seed), forest.nodes()
    reference.fuse_all(roots, 1.0)
    levels = []
    for depth in topology.depths:
        for node in (nodes := reference.level(roots, depth)):
            probed = bool(node.children) and node.children[0].stochastic and numbers.random() >= masked
            node.probe = numbers.gauss(0, 1) if probed else None  # type: ignore[attr-defined]
        worths = [math.nan if node.probe is None else node.probe for node in nodes]  # type: ignore[attr-defined]
        levels.append(torch.tensor(worths, dtype=torch.float64))
    for root in roots:
        differences(root, returns)
    values = strategies.node_values(roots)
    found = probe_differences(topology, values, tuple(levels), returns)  # type: ignore[arg-type]
    advantages = probe_advantages(topology, values, tuple(levels), returns, 1e-8)  # type: ignore[arg-type]
    for depth in topology.depths:
        for node in reference.level(roots, depth):
            root = roots[node.prompt]
            leaves = [leaf.reward for leaf in reference.valid_leaves(root)]
            deviation = reference.sample_std(leaves, reference.score_rounding(root)) if leaves else 0.0
            expected = node.difference  # type: ignore[attr-defined]
            assert float(found[depth][node.place]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
            scaled = expected / (deviation + 1e-8) if deviation else 0.0
            assert float(advantages[depth][node.place]) == pytest.approx(scaled, rel=1e-5, abs=1e-7)


def test_raw_rewards_are_added_in_probes_too() -> None:
    levels = {"a": (torch.tensor([1.0, 2.0]),), "b": (torch.tensor([10.0, torch.nan]),)}
    assert weighted_sum(levels, {"a": 2.0, "b": -0.5, "unused": 3.0})[0].nan_to_num(7.0).tolist() == [-3.0, 7.0]


def drift(theta: Tensor) -> VelocityFunction:
    """A velocity whose constant is each tree's own parameter."""
    return lambda latents, sigma, tree: theta[tree] + 0.5 * latents


def reward(latents: Tensor) -> Tensor:
    return torch.sin(2 * latents[:, 0]) + latents[:, 0].square()


def gradients(tree: BranchTree, sampler: Sampler, credit: tuple[Tensor, ...]) -> Tensor:
    """Each tree's estimate of d E[reward] / d theta."""
    topology = tree.topology
    theta = torch.zeros(topology.prompts, 1, requires_grad=True)
    total = torch.zeros(())
    for step in topology.plans[0].splits:
        parent, root = topology.parent[step + 1], topology.root[step + 1]
        states, depth = tree.states[step][parent], torch.full_like(parent, step)
        prediction = drift(theta)(states, sampler.sigmas[depth], root)
        made = sampler.transition(states, prediction, depth, torch.ones_like(parent, dtype=torch.bool))
        density = made.log_prob(tree.states[step + 1], "sum")
        total = total + (credit[step + 1] * density).sum() / topology.plans[0].widths[step + 1]
    (found,) = torch.autograd.grad(total, theta)
    return found[:, 0].double()


def many_trees(trees: int, sampler: Sampler) -> BranchTree:
    """Trees of one plan from one generator, since addressing their noise would take the test's time."""
    source = torch.Generator().manual_seed(3)
    topology = grow([make_plan(4, {0: 2, 2: 2}, stochastic=[])] * trees)
    states = [torch.randn(trees, 1, generator=source)]
    for step in range(4):
        before, parent = states[-1], topology.parent[step + 1]
        depth, active = torch.full((len(before),), step), topology.stochastic(step)
        prediction = drift(torch.zeros(trees, 1))(before, sampler.sigmas[depth], topology.root[step])
        transition = sampler.transition(before, prediction, depth, active).rows(parent)
        states.append(transition.sample(torch.randn(len(parent), 1, generator=source)))
    flat = tuple(torch.zeros(topology.width(depth)) for depth in topology.depths)
    return BranchTree(topology, sampler.sigmas, tuple(states), flat)


def test_the_probe_of_the_parent_leaves_the_gradient_unbiased() -> None:
    sampler = Sampler(DanceSde(1.0), IndependentSiblings(), time_grid(4, 1.0), reduction="sum")
    tree = many_trees(8000, sampler)
    topology, probes = tree.topology, Probes.of(tree.topology)
    latents = probes.sample(drift(torch.zeros(8000, 1)), sampler, tree, torch.device("cpu"), None)
    scores = probes.by_node(reward(latents), torch.ones(len(probes), dtype=torch.bool))
    valid = torch.ones(topology.width(4), dtype=torch.bool)
    values = fuse(topology, tree.log_prob, reward(tree.leaves), valid, beta=0.0)
    plain = gradients(tree, sampler, values.value)
    probed = gradients(tree, sampler, probe_differences(topology, values, scores, "leaf"))
    by_step = gradients(tree, sampler, probe_differences(topology, values, scores, "step"))
    group = gradients(tree, sampler, _less_group_mean(tree, values))

    def apart(first: Tensor, second: Tensor) -> float:
        """The difference of two estimates on the same trees, in standard errors."""
        difference = first - second
        return float(difference.mean().abs() / (difference.std() / math.sqrt(len(difference))))

    assert apart(plain, probed) < 3
    assert probed.var() < plain.var()
    # The test can tell: a baseline that contains the return itself, and a return that leaves later noise out.
    assert apart(plain, group) > 5
    assert apart(plain, by_step) > 5


def _less_group_mean(tree: BranchTree, values: NodeValues) -> tuple[Tensor, ...]:
    """Each value less the mean over its family, itself included."""
    topology = tree.topology
    levels = [torch.zeros(topology.prompts).double()]
    for depth in topology.depths[1:]:
        parent, count = topology.parent[depth], topology.width(depth - 1)
        mean = torch.zeros(count).double().index_add_(0, parent, values.value[depth])
        levels.append(values.value[depth] - (mean / torch.bincount(parent, minlength=count))[parent])
    return tuple(levels)


# --- in a run ---


def expected_advantage(done: Iteration, returns: str, depth: int, node: int) -> float:
    """The advantage of the edge into a node by the written formula, from an iteration's scores."""
    topology, scores = done.group.topology, done.group.scores["digits"].values.double()
    probes, values = done.group.probes["digits"], done.credit.values["digits"].value
    plan_of_node, prompt = topology.plans[int(topology.root[depth][node])], int(topology.root[depth][node])
    at, here = depth, node
    while not plan_of_node.stochastic[at - 1]:  # a deterministic edge has the advantage of the one before
        at, here = at - 1, int(topology.parent[at][here])
        if at == 0:
            return 0.0
    worth, below, child = float(values[at][here]), at, here
    if returns == "step":
        while below < topology.steps and not plan_of_node.stochastic[below]:
            below, child = below + 1, topology.parent[below + 1].tolist().index(child)
        worth = float(scores[child] if below == topology.steps else probes[below][child])
    baseline = float(probes[at - 1][int(topology.parent[at][here])])
    own = [score for score, root in zip(scores.tolist(), topology.leaf_root.tolist(), strict=True) if root == prompt]
    return min(max((worth - baseline) / (reference.sample_std(own) + 1e-8), -5.0), 5.0)


ADAPTIVE: dict[str, Any] = {"tree__splits": "adaptive", "tree__branches": 4, "tree__draw": {"first": 0.2, "last": 0.5}}
TREES: dict[str, dict[str, Any]] = {
    "adaptive": {**ADAPTIVE, "tree__steps": 6},
    "adaptive and joined": {**ADAPTIVE, "tree__steps": 6, "tree__join": 2, "sampler__kind": "flow"},
    "joined": {"tree__steps": 7, "tree__splits": [0, 3], "tree__join": [3, 2], "tree__sde": "splits"},
    "joined, others stochastic": {"tree__steps": 7, "tree__splits": [0, 3], "tree__join": [2, 1]},
}


@pytest.mark.parametrize("returns", ["leaf", "step"])
@pytest.mark.parametrize("tree", TREES)
def test_probes_are_the_baseline_of_adaptive_and_of_joined_steps(
    tree: str, returns: str, model: Path, tmp_path: Path
) -> None:
    """Advantages are those of the formula, the work is that of the plan, and the policy learns."""
    overrides = small(model, **{**TREES[tree], "credit__baseline": "probe", "credit__returns": returns})
    planned, session = plan("quickstart", overrides).iteration, opened("quickstart", overrides, tmp_path / "run")
    done = iterate(session, 0)
    row, topology = gather_metrics(session, done), done.group.topology
    for depth in topology.depths:
        found = done.credit.advantages[depth].tolist()
        expected = [0.0] * len(found) if depth == 0 else [
            expected_advantage(done, returns, depth, node) for node in range(topology.width(depth))
        ]  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (row["leaves/probes"], row["rows/probes"]) == (planned.probes, planned.probe_rows)
    assert (row["rows/rollout"], row["rows/gradient"]) == (planned.rollout_rows, planned.gradient_rows)
    assert row["steps/taken"] == 1 and row["grad_norm"] > 0
    if not tree.startswith("adaptive"):
        return
    # The child that takes the deterministic step is the probe of its parent.
    scores, probes = done.group.scores["digits"].values, done.group.probes["digits"]
    for prompt, plan_of_prompt in enumerate(topology.plans):
        split = plan_of_prompt.last_split
        probe = float(probes[split][topology.span(prompt, split).start])
        assert float(scores[topology.span(prompt, topology.steps).start]) == pytest.approx(probe, rel=1e-3, abs=1e-3)
    assert session.trained.splits is not None
    before = session.trained.splits.state
    session.trained.splits.observe(0, session.processes, session.team, topology, done.credit)
    assert session.trained.splits.state != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit.returns": "step"}, r"credit.returns: step is a difference of probes; set credit.baseline to probe"),
        (
            {"credit.baseline": "probe", "credit.estimator": {"name": "depth"}},
            r"credit.estimator: 'depth' has no use for probes",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    recipe = load_recipe("quickstart", changes)
    with pytest.raises(RecipeError, match=message):
        check_learns(recipe, make_kernel(recipe.sampler, "velocity"))


def test_a_transition_without_an_ode_has_no_probes() -> None:
    recipe = load_recipe("quickstart", {"credit.baseline": "probe"})
    with pytest.raises(RecipeError, match=r"credit.baseline: a probe goes on without noise"):
        check_learns(recipe, object())  # type: ignore[arg-type]


def test_a_reward_of_whole_groups_scores_no_probe() -> None:
    rewards = [NamedReward("compares", 1.0, Compares(Config()))]
    with pytest.raises(RecipeError, match="the reward 'compares' compares all leaves of a prompt"):
        refuse_group_rewards("probe", rewards)
    refuse_group_rewards("group", rewards)
    refuse_group_rewards("probe", [replace(rewards[0], weight=0.0)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_flux import tiny_flux

    return tiny_flux(tmp_path_factory.mktemp("flux"))


def test_two_processes_learn_with_probes_and_over_the_batch_what_one_learns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = [{"reward": "digits"}, {"reward": "digits", "label": "again", "classifier": "heldout", "weight": 0.5}]
    changes = {"tree__sde": "splits", "credit__baseline": "probe", "credit__batch_normalise": True, "rewards": judged}
    overrides = small(model, scoring__max_invalid=1.0, **changes)
    read_picky(monkeypatch.setattr)
    train("quickstart", overrides, output=tmp_path / "one")
    words = ["train", "quickstart", *arguments(overrides), "--output", str(tmp_path / "two"), "--no-report"]
    done = Python(str(SCRIPT), "2", *words)
    assert done.ended() == 0, done.out + done.err
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for first, second in zip(one, two, strict=True):
        noise = {name for name in first if name.startswith(("log_prob/", "ratio/"))}
        compared = ({name: row[name] for name in row.keys() - noise} for row in (first, second))
        assert next(compared) == pytest.approx(next(compared), rel=1e-3, abs=1e-5)
    assert spreads(tmp_path / "two") == pytest.approx(spreads(tmp_path / "one"), rel=1e-4)
    planned = plan("quickstart", overrides).iteration
    # Of each prompt the root and the two nodes of depth 2 are probed, over 6 and 4 steps.
    assert (one[0]["leaves/probes"], one[0]["rows/probes"]) == (planned.probes, planned.probe_rows) == (6, 28)
    assert one[0]["rows/equivalent"] == one[0]["rows/rollout"] + 28 + 3 * one[0]["rows/gradient"]
    start = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = max(float((first[name] - start[name]).abs().max()) for name in start)
    assert max(float((first[name] - second[name]).abs().max()) for name in start) < 2e-2 * moved
