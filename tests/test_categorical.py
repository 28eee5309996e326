"""Transitions of tokens: their law whatever the siblings' dependence, their densities, and trees of integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from branchtree.core.categorical import CategoricalTransition, gumbel
from branchtree.core.noise import CorrelatedSiblings, IndependentSiblings, NoiseSource, NormalSiblings, SimplexSiblings
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.tree import grow

SIBLINGS: list[NormalSiblings] = [IndependentSiblings(), CorrelatedSiblings(0.7), SimplexSiblings()]
RULES = pytest.mark.parametrize("siblings", SIBLINGS, ids=lambda rule: type(rule).__name__)
CHANCE = 1e-4
"""Of failing by chance, for each test of a distribution."""


def transition(rows: int = 2, positions: int = 3, words: int = 5, seed: int = 0) -> CategoricalTransition:
    source = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, positions, words, generator=source)
    drawn = torch.rand(rows, positions, generator=source) < 0.6
    drawn[0, 0] = True
    tokens = torch.randint(words, (rows, positions), generator=source)
    return CategoricalTransition(tokens, logits.log_softmax(-1), drawn, torch.ones(rows, dtype=torch.bool))


@RULES
@pytest.mark.parametrize("child", [0, 2])
def test_each_childs_tokens_have_the_models_distribution(siblings: NormalSiblings, child: int) -> None:
    """By a chi-square test, for the first child and the last of three."""
    one, families = transition(1), 4000
    noise = siblings.draw(NoiseSource(5, 0), 0, 1, range(families), 3, (3, 5))
    found = one.rows(torch.zeros(families, dtype=torch.int64)).sample(noise[child::3])
    for position in torch.nonzero(one.drawn[0])[:, 0]:
        counts = torch.bincount(found[:, position], minlength=5)
        expected = one.log_probs[0, position].exp().double()
        assert stats.chisquare(counts.numpy(), (expected / expected.sum() * families).numpy()).pvalue > CHANCE
    kept = ~one.drawn[0]
    assert torch.equal(found[:, kept], one.tokens[:, kept].expand(families, -1))


def test_antithetic_siblings_agree_less_often_than_independent_ones() -> None:
    one, families = transition(1), 4000
    alike = {}
    for siblings in SIBLINGS:
        noise = siblings.draw(NoiseSource(5, 0), 0, 1, range(families), 2, (3, 5))
        tokens = one.rows(torch.zeros(2 * families, dtype=torch.int64)).sample(noise)[:, one.drawn[0]]
        alike[type(siblings)] = float((tokens[::2] == tokens[1::2]).double().mean())
    assert alike[SimplexSiblings] + 0.02 < alike[IndependentSiblings] < alike[CorrelatedSiblings] - 0.02


def test_noise_is_that_of_gumbel() -> None:
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    assert stats.kstest(gumbel(noise).numpy(), stats.gumbel_r.cdf).pvalue > CHANCE
    assert bool(gumbel(torch.tensor([-30.0, 30.0])).isfinite().all())


@given(st.integers(0, 10**6), st.sampled_from(["mean", "sum"]))
def test_densities_are_those_of_the_drawn_tokens_one_by_one(seed: int, reduction: str) -> None:
    one, other = transition(seed=seed), transition(seed=seed + 1)
    following = one.sample(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)))
    other = CategoricalTransition(one.tokens, other.log_probs, one.drawn, one.random)
    found, divergence = one.log_prob(following, reduction), one.kl(other, reduction)  # type: ignore[arg-type]
    for row in range(2):
        density = difference = 0.0
        for position in range(3):
            if one.drawn[row, position]:
                density += float(one.log_probs[row, position, following[row, position]])
                for word in range(5):
                    own, theirs = (float(each.log_probs[row, position, word]) for each in (one, other))
                    difference += math.exp(own) * (own - theirs)
        divisor = 3 if reduction == "mean" else 1
        assert float(found[row]) == pytest.approx(density / divisor, abs=1e-5)
        assert float(divergence[row]) == pytest.approx(difference / divisor, abs=1e-5)


def test_rows_that_are_not_random_take_the_likeliest_tokens() -> None:
    one = transition()
    still = CategoricalTransition(one.tokens, one.log_probs, one.drawn, torch.tensor([True, False]))
    noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    likeliest = torch.where(one.drawn, one.log_probs.argmax(-1), one.tokens)
    assert torch.equal(still.sample(noise)[1], likeliest[1]) and torch.equal(one.sample(None), likeliest)
    assert float(still.log_prob(still.sample(noise))[1]) == 0 and float(still.kl(still)[1]) == 0


@dataclass(frozen=True)
class Reveal:
    """Draws each position whose turn has come, in order, from logits that depend on what is known."""

    words: int

    def noise_shape(self, latent: Sequence[int]) -> Sequence[int]:
        return (*latent, self.words)

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> CategoricalTransition:
        count = latents.shape[1]
        order = torch.arange(count) + 0.5
        drawn = (order < count * (1 - sigma_next)[:, None]) & (order > count * (1 - sigma)[:, None])
        return CategoricalTransition(latents, prediction.log_softmax(-1), drawn, active)


def test_a_tree_of_tokens_keeps_integers_and_its_densities() -> None:
    words, positions, steps = 4, 6, 3
    unknown = words

    def logits(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        known = torch.where(latents == unknown, 0, latents).double().cumsum(1)
        return torch.sin(known[..., None] + torch.arange(words) + prompt[:, None, None]).float()

    sampler = Sampler(Reveal(words), CorrelatedSiblings(1.0), torch.linspace(1, 0, steps + 1), "sum")
    topology = grow([TreePlan((2, 3, 1), (True, True, False), (True, True, False))] * 2)
    initial = torch.full((2, positions), unknown)
    tree = rollout(logits, sampler, topology, initial, NoiseSource(3, 0), [0, 1])
    assert all(not states.is_floating_point() for states in tree.states)
    assert bool((tree.leaves < words).all()) and len(tree.leaves.unique(dim=0)) > 4
    for depth in (1, 2):
        parents, children = topology.parent[depth], tree.states[depth]
        rows = len(parents)
        following = sampler.transition(
            tree.states[depth - 1][parents],
            logits(tree.states[depth - 1][parents], torch.zeros(rows), topology.root[depth]),
            torch.full((rows,), depth - 1),
            torch.ones(rows, dtype=torch.bool),
        )
        assert torch.equal(following.log_prob(children, "sum"), tree.log_prob[depth])
