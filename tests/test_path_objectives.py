"""The rules that make up the loss of an edge, against a reading of their papers in double precision."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import strategies
import torch
from guests import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import make_plan
from torch import Tensor
from training_runs import arguments, metrics

from branchtree import load_recipe, plan
from branchtree.core.families import Families, collect_families
from branchtree.core.gaussian import CpsSde, DanceSde, FlowSde, GaussianTransition
from branchtree.core.grid import time_grid
from branchtree.core.loss import CentredRatio, DivergenceMask, Edges, silenced
from branchtree.core.noise import IndependentSiblings, NoiseSource
from branchtree.core.pruning import trainable_edges
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.transitions import Kernel
from branchtree.core.tree import BranchTree, grow
from branchtree.core.weighting import gradient_weights
from branchtree.recipe.build import make_edge_rules
from branchtree.recipe.schema import LossSection, Recipe
from branchtree.training.objective import OptimiserStep, Policies, UpdateRecord
from branchtree.training.path import PathObjective

SHAPE = (2, 3)
MOST_FAMILIES = 8
"""Of a forest's, which are read edge by edge."""
KERNELS: list[tuple[Kernel, Callable[..., Any]]] = [
    (DanceSde(0.6), reference.dance(0.6)),
    (FlowSde(0.7), reference.flow(0.7)),
    (CpsSde(0.5), reference.cps(0.5)),
]
RULES = [
    {"ratio": "plain", "trust": "clip"},
    {"ratio": "centred", "trust": "clip"},
    {"ratio": "plain", "trust": "divergence"},
    {"ratio": "centred", "trust": "divergence"},
]


@dataclass(frozen=True)
class Policy:
    """v = x W + sigma b, in any precision."""

    weight: Tensor  # (3, 3)
    bias: Tensor  # (3,)

    def __call__(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        return latents @ self.weight + sigma.view(-1, *[1] * (latents.ndim - 1)) * self.bias

    def moved(self, seed: int, far: float) -> Policy:
        source = torch.Generator().manual_seed(seed)
        return Policy(
            self.weight + far * torch.randn(3, 3, generator=source), self.bias + far * torch.randn(3, generator=source)
        )

    def fresh(self, dtype: torch.dtype) -> Policy:
        """The same numbers, ready to be differentiated."""
        weight, bias = (each.detach().to(dtype).requires_grad_() for each in (self.weight, self.bias))
        return Policy(weight, bias)

    @property
    def gradient(self) -> Tensor:
        assert self.weight.grad is not None and self.bias.grad is not None
        return torch.cat([self.weight.grad.flatten(), self.bias.grad]).double()


@dataclass(frozen=True)
class Grown:
    """Trees of the old policy, their trained edges, and a policy that has moved."""

    sampler: Sampler
    step: Callable[..., Any]
    tree: BranchTree
    families: Families
    old: Policy
    new: Policy


def grown(plans: tuple[TreePlan, ...], kernel: int, seed: int, far: float = 0.05) -> Grown:
    topology = grow(plans)
    made, step = KERNELS[kernel]
    sampler = Sampler(made, IndependentSiblings(), time_grid(topology.steps, 3.0))
    source = torch.Generator().manual_seed(seed)
    old = Policy(0.3 * torch.randn(3, 3, generator=source), torch.randn(3, generator=source))
    initial = torch.randn(len(plans), *SHAPE, generator=source)
    tree = rollout(old, sampler, topology, initial, NoiseSource(seed, 0), range(len(plans)))
    advantages = tuple(torch.randn(topology.width(d), generator=source).double() for d in topology.depths)
    families = collect_families(topology, advantages, trainable_edges(topology))
    chosen = torch.randperm(len(families), generator=source)[:MOST_FAMILIES].sort().values
    families = families.select(chosen)
    return Grown(sampler, step, tree, families, old, old.moved(seed + 1, far))


@functools.cache
def quickstart() -> Recipe:
    return load_recipe("quickstart")


def objective(case: Grown, **loss: Any) -> PathObjective:
    recipe = quickstart().model_copy(update={"loss": LossSection(**loss)})
    return PathObjective(case.sampler, recipe.loss, torch.device("cpu"), make_edge_rules(recipe))


def library(case: Grown, rules: PathObjective, families: Families, first: bool = False) -> tuple[Tensor, UpdateRecord]:
    """Losses (E,) of the moved policy, or of the old one at the first step, whose weights have the sum's gradient."""
    record = UpdateRecord()
    policy = (case.old if first else case.new).fresh(torch.float32)
    earlier = None if first else rules.earlier(case.tree, families, Policies(case.old, None))
    losses = rules.losses(OptimiserStep(case.tree, Policies(policy, None), first), families, earlier, record)
    losses.sum().backward()
    record.grad_norms = policy.gradient.tolist()
    return losses.detach().double(), record


@dataclass
class Reading:
    """One edge's figures, in double precision."""

    ratio: float
    loss: Tensor
    masked: bool
    certain: bool  # whether single precision can tell


def density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()


def read(case: Grown, policy: Policy, edge: int, loss: LossSection) -> Reading:
    """One edge by the written formulas, from the log-densities' difference on."""
    families, sigmas = case.families, [float(sigma) for sigma in case.sampler.sigmas]
    family = int(families.family[edge])
    depth = int(families.depth[family])
    x = case.tree.states[depth][int(families.parent[family])].double()
    following = case.tree.states[depth + 1][int(families.child[edge])].double()
    here, there, advantage = sigmas[depth], sigmas[depth + 1], float(families.advantage[edge])
    level, prompt = torch.tensor([here], dtype=torch.float64), torch.zeros(1)
    mean, std = case.step(x, policy(x[None], level, prompt)[0], here, there, True)
    old_policy = case.old.fresh(torch.float64)
    old_mean, _ = case.step(x, old_policy(x[None], level, prompt)[0].detach(), here, there, True)
    difference = density(following, mean, std) - density(following, old_mean, std)
    divergence = ((mean - old_mean) ** 2).mean() / (2 * std**2)
    ratio = ((difference + divergence) * std).exp() if loss.ratio == "centred" else difference.exp()
    if loss.ratio == "centred":  # the identity that the library computes by
        noise = (following - old_mean) / std
        identity = (noise * (mean - old_mean)).mean().exp()
        assert float(ratio.detach()) == pytest.approx(float(identity.detach()), abs=1e-12)
    rho = float(ratio.detach())
    if loss.trust == "clip":
        value = -torch.minimum(ratio * advantage, ratio.clamp(1 - loss.clip_range, 1 + loss.clip_range) * advantage)
        beyond, limit = abs(rho - 1), loss.clip_range
    else:
        beyond, limit = float(divergence.detach()), loss.max_divergence
    masked = beyond > limit and ((advantage > 0 and rho > 1) or (advantage < 0 and rho < 1))
    if loss.trust == "divergence":
        value = 0 * ratio if masked else -ratio * advantage
    certain = abs(beyond - limit) > 1e-3 * limit
    return Reading(rho, value * step_weight(case, depth, loss), masked, certain)


def step_weight(case: Grown, depth: int, loss: LossSection) -> float:
    sigmas = [float(sigma) for sigma in case.sampler.sigmas]
    steps = list(pairwise(sigmas[:-1]))
    if loss.weighting == "noise":
        weights = [case.step(0.0, 0.0, here, there, True)[1] for here, there in steps]
    elif loss.weighting == "gradient":
        weights = []
        for here, there in steps:
            (still, std), (moved, _) = (case.step(0.0, velocity, here, there, True) for velocity in (0.0, 1.0))
            weights.append(std / abs(moved - still))
    else:
        weights = [1.0] * len(steps)
    weight = weights[depth] / reference.mean(weights)
    return weight / (sigmas[depth] - sigmas[depth + 1]) if loss.divide_by_dt else weight


@given(
    strategies.batches(),
    st.sampled_from(RULES),
    st.sampled_from(["none", "noise", "gradient"]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
@settings(strategies.thorough, max_examples=40)
def test_losses_and_their_gradient_equal_the_reading(
    plans: tuple[TreePlan, ...], rules: Mapping[str, Any], weighting: str, by_dt: bool, kernel: int, seed: int
) -> None:
    """Some edges are clipped or masked, some are not: the limits lie in the middle of what the move makes."""
    case = grown(plans, kernel, seed)
    if case.families.edges == 0:
        return
    limits = {"clip_range": 1e-2, "max_divergence": 1e-3}
    made = objective(case, **rules, **limits, weighting=weighting, divide_by_dt=by_dt)
    losses, record = library(case, made, case.families)
    policy = case.new.fresh(torch.float64)
    expected = [read(case, policy, edge, made.loss) for edge in range(case.families.edges)]
    torch.stack([each.loss for each in expected]).sum().backward()
    wanted = torch.stack([each.loss.detach() for each in expected])
    assert float((losses - wanted).abs().max()) <= 1e-6 * max(float(wanted.abs().max()), 1.0)
    scale = max(float(policy.gradient.abs().max()), float(wanted.abs().sum()), 1.0)
    assert float((torch.tensor(record.grad_norms) - policy.gradient).abs().max()) <= 1e-6 * scale
    away = [abs(each.ratio - 1) for each in expected]
    assert torch.cat(record.deviation).tolist() == pytest.approx(away, abs=1e-6)
    found = torch.cat(record.clipped).tolist()
    assert all(one == each.masked for one, each in zip(found, expected, strict=True) if each.certain)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules.values()))
def test_at_the_first_step_nothing_has_moved(rules: Mapping[str, Any]) -> None:
    """Ratios are 1 to the bit, nothing is silenced, and the centred gradient is the plain one times the noise."""
    case = grown((make_plan(5, {0: 3, 2: 2}),), 1, 3)
    losses, record = library(case, objective(case, **rules), case.families, first=True)
    assert torch.cat(record.deviation).tolist() == torch.cat(record.first_deviation).tolist() == [0] * len(losses)
    assert losses.tolist() == (-case.families.advantage).tolist()
    assert not bool(torch.cat(record.clipped).any())


def test_the_centred_gradient_is_the_plain_one_times_the_noise() -> None:
    """At the first step, so that one family's differs from the plain one's by the deviation of its step alone."""
    case = grown((make_plan(5, {0: 3, 2: 2}),), 1, 3)
    for family in range(len(case.families)):
        one = case.families.select(torch.tensor([family]))
        depth = int(one.depth[0])
        (here, there) = (float(sigma) for sigma in case.sampler.sigmas[depth : depth + 2])
        _, std = case.step(0.0, 0.0, here, there, True)
        plain, centred = (
            torch.tensor(library(case, objective(case, ratio=ratio), one, first=True)[1].grad_norms)
            for ratio in ("plain", "centred")
        )
        torch.testing.assert_close(centred, std * plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules.values()))
def test_losses_do_not_depend_on_the_batch(rules: Mapping[str, Any]) -> None:
    case = grown((make_plan(5, {0: 3, 2: 2}), make_plan(5, {1: 4})), 0, 7)
    made = objective(case, **rules, clip_range=1e-2, weighting="gradient")
    whole, _ = library(case, made, case.families)
    alone = [library(case, made, case.families.select(torch.tensor([i])))[0] for i in range(len(case.families))]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-6)


def test_a_rounded_density_does_not_reach_the_centred_ratio() -> None:
    """A move that float32 densities cannot resolve: the ratio is still right to its own digits."""
    source = torch.Generator().manual_seed(1)
    old, noise, move = (torch.randn(1, 4096, generator=source) for _ in range(3))
    std = torch.full((1, 1), 0.2)
    following = old + std * noise
    new = old + 1e-6 * move
    edges = Edges(
        torch.ones(1), following, GaussianTransition(new, std), *[torch.zeros(1)] * 2, GaussianTransition(old, std)
    )
    eps = (following.double() - old.double()) / std.double()
    expected = float((eps * (new.double() - old.double())).mean())
    assert float(CentredRatio()(edges).log()) == pytest.approx(expected, abs=1e-7)


# --- the mask by divergence ---


@pytest.mark.parametrize(
    ("move", "ratio", "advantage", "masked"),
    [
        (0.2, 1.5, 2.0, True),  # far, and more likely as it should be
        (0.2, 0.5, 2.0, False),  # far, but it has to come back
        (0.2, 0.5, -2.0, True),
        (0.2, 1.5, -2.0, False),
        (0.01, 1.5, 2.0, False),  # near: no clip of the ratio
        (0.2, 1.0, 2.0, False),
        (0.2, 1.5, 0.0, False),  # no advantage: nothing to mask
    ],
)
def test_worked_masks(move: float, ratio: float, advantage: float, masked: bool) -> None:
    """Of deviation 0.5: divergence 0.08 or 0.0002, and a limit of 0.01."""
    std = torch.full((1, 1), 0.5)
    old, new = (GaussianTransition(torch.full((1, 4), mean), std) for mean in (1.0, 1.0 + move))
    assert float(new.kl(old)) == pytest.approx(move**2 / 0.5, rel=1e-4)
    edges = Edges(torch.tensor([advantage]), old.mean, new, *[torch.zeros(1)] * 2, old)
    rho = torch.tensor([ratio], requires_grad=True)
    losses = DivergenceMask(0.01)(rho, edges)
    assert losses.tolist() == pytest.approx([0.0 if masked else -ratio * advantage])
    assert silenced(losses, rho, edges.advantage).tolist() == [masked]
    losses.sum().backward()
    assert rho.grad is not None and float(rho.grad) == (0 if masked else -advantage)


def test_a_rule_that_compares_must_say_so() -> None:
    edges = Edges(
        torch.ones(1), torch.zeros(1, 4), GaussianTransition(torch.zeros(1, 4), torch.ones(1, 1)), *[torch.zeros(1)] * 2
    )
    with pytest.raises(ValueError, match="must have compares_transitions = True"):
        DivergenceMask(0.01)(torch.ones(1), edges)


# --- weights ---


def test_gradient_weights_are_the_published_ones() -> None:
    """For the flow's SDE, whatever its noise level; a step with other noise than the grid's has its own weight."""
    sigmas = time_grid(10, 3.0)
    for kernel, level in ((DanceSde(0.4), lambda here, there: 0.4), (FlowSde(0.7), flow_level)):
        sampler = Sampler(kernel, IndependentSiblings(), sigmas)
        inverse = []
        for here, there in pairwise([float(sigma) for sigma in sigmas[:-1]]):
            g, root = level(here, there), math.sqrt(here - there)
            inverse.append(1 / (root / g + g * root * (1 - here) / (2 * here)))
        weights = gradient_weights(sampler, torch.arange(9), torch.arange(1, 10), torch.ones(9, dtype=torch.bool))
        assert weights.tolist() == pytest.approx([each / reference.mean(inverse) for each in inverse], rel=1e-6)
        assert float(weights.mean()) == pytest.approx(1)


def flow_level(here: float, there: float) -> float:
    return 0.7 * math.sqrt(here / (1 - (there if here == 1 else here)))


# --- in runs ---

SMALL: dict[str, Any] = {"callbacks": [], "evaluation": None, "run.sample_prompts": 1, "run.iterations": 2}
MOVING: dict[str, Any] = {**SMALL, "optim.steps_per_iteration": 2}


@pytest.fixture
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    """The plug-in whose model takes a millisecond."""
    plug(guest_site)


@pytest.mark.usefixtures("guest")
@pytest.mark.parametrize(
    "changes",
    [
        {"loss.ratio": "centred", "loss.clip_range": 1e-4},
        {"loss.trust": "divergence"},
        {"loss.trust": "divergence", "loss.max_divergence": 1e6},
        {"loss.weighting": "gradient"},
        {"loss.divide_by_dt": True},
    ],
    ids=str,
)
def test_each_key_trains_and_costs_what_is_planned(
    changes: dict[str, Any], tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    """By the command line, and the results do not depend on the size of batches."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output, limit in ((whole, {}), (cut, {"batch.update_rows": 3})):
        words = arguments({**MOVING, **changes, **limit})
        assert command("train", "guest", *words, "--output", str(output)).code == 0
    looks_back = "loss.ratio" in changes or "loss.trust" in changes
    for row, other in zip(metrics(whole), metrics(cut), strict=True):
        assert (row["steps/taken"], row["ratio/first_step_max_deviation"]) == (2, 0)
        assert row["ratio/max_deviation"] > 0 < row["grad_norm"]
        assert (0 < row["rows/rescored"] < row["rows/gradient"]) if looks_back else row["rows/rescored"] == 0
        assert other == pytest.approx(row, rel=1e-3, abs=1e-5)
    silent = [row["ratio/clipped_fraction"] for row in metrics(whole)]
    if looks_back:
        assert any(fraction > 0 for fraction in silent) == ("loss.max_divergence" not in changes)
    planned = plan("guest", {**MOVING, **changes})
    forward = planned.footprint.forward_flops_per_row * planned.gradient_rows
    assert planned.gradient_flops == pytest.approx(forward * (3.5 if looks_back else 3))
    kept = plan("guest", {**MOVING}).memory.states < planned.memory.states
    assert kept == looks_back
