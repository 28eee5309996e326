"""GDPO's second normalisation: over all prompts of an iteration, and alike on any number of processes."""

from __future__ import annotations

import statistics

import pytest
import strategies
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Forest

from branchtree.core.advantages import (
    Advantages,
    advantage_moments,
    batch_normalised,
    depth_advantages,
    sibling_advantages,
)
from branchtree.core.fusion import fuse
from branchtree.core.pruning import trainable_edges

EPS = 1e-4


def estimated(forest: Forest) -> Advantages:
    """What two rewards of different weights add up to."""
    topology, rewards, valid = forest.topology, forest.reward_tensor, forest.valid_tensor
    each = [
        estimator(topology, fuse(topology, forest.edge_log_prob, reward, valid), 1e-8)
        for estimator, reward in ((depth_advantages, rewards), (sibling_advantages, rewards.square()))
    ]
    return tuple(2.0 * first - 0.5 * second for first, second in zip(*each, strict=True))


def moments(forest: Forest, advantages: Advantages) -> torch.Tensor:
    return advantage_moments(forest.topology, advantages, trainable_edges(forest.topology))


@given(strategies.forests())
@strategies.thorough
def test_a_batch_is_normalised_over_its_trained_edges(forest: Forest) -> None:
    advantages = estimated(forest)
    trained = [
        float(advantage)
        for level, edges in zip(advantages, trainable_edges(forest.topology), strict=True)
        for advantage, edge in zip(level, edges, strict=True)
        if edge and advantage != 0
    ]
    assume(len(trained) > 1 and statistics.stdev(trained) > 1e-3)
    result = batch_normalised(advantages, moments(forest, advantages), EPS)
    centre, deviation = statistics.fmean(trained), statistics.stdev(trained)
    for level, before in zip(result, advantages, strict=True):
        expected = [0.0 if a == 0 else (a - centre) / (deviation + EPS) for a in before.tolist()]
        assert level.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert bool((level[before == 0] == 0).all())  # exact: such an edge costs no compute


@given(strategies.forests(), st.data())
@strategies.thorough
def test_the_result_does_not_depend_on_how_prompts_are_shared_out(forest: Forest, data: st.DataObject) -> None:
    prompts = range(len(forest.plans))
    cut = data.draw(st.integers(0, len(prompts)))
    shares = [forest.take(own) for own in (prompts[:cut], prompts[cut:]) if len(own)]
    advantages = [estimated(share) for share in shares]
    together = torch.cat([moments(share, own) for share, own in zip(shares, advantages, strict=True)])
    each = [batch_normalised(own, together, EPS) for own in advantages]
    whole = batch_normalised(estimated(forest), moments(forest, estimated(forest)), EPS)
    for level, *parts in zip(whole, *each, strict=True):
        assert level.equal(torch.cat(parts))


def test_advantages_without_any_spread_are_0() -> None:
    level = torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64)
    assert batch_normalised((level,), torch.tensor([[2.0, 2.0, 0.0]]).double(), EPS)[0].tolist() == [0, 0, 0]
    nothing = torch.zeros(3, dtype=torch.float64)
    assert batch_normalised((nothing,), torch.zeros(1, 3).double(), EPS)[0].equal(nothing)
