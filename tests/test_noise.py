"""Addressed noise, and the laws of siblings' noises."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import Tensor

from branchtree.core.noise import (
    CorrelatedSiblings,
    IndependentSiblings,
    NoiseSource,
    Purpose,
    Siblings,
    SimplexSiblings,
)

SOURCE = NoiseSource(seed=42, iteration=7)
ALPHA = 1e-3
"""Each statistical test here would fail once in 1,000 seeds; the seeds are fixed, so none fails by chance."""


def family(siblings: Siblings, branches: int, parents: int = 64, size: int = 4096) -> Tensor:
    """Noises (parents, branches, size)."""
    noise = siblings.draw(SOURCE, 3, 5, range(parents), branches, (size,))
    return noise.view(parents, branches, size)


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1])


@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0, 8.0])
def test_correlated_siblings_correlate_as_specified(strength: float) -> None:
    noise = family(CorrelatedSiblings(strength), 2)
    assert correlation(noise[:, 0], noise[:, 1]) == pytest.approx(1 / (1 + strength**2), abs=0.01)


def test_every_pair_of_many_siblings_correlates_alike() -> None:
    noise = family(CorrelatedSiblings(1.0), 4)
    for a, b in combinations(range(4), 2):
        assert correlation(noise[:, a], noise[:, b]) == pytest.approx(0.5, abs=0.01)


def test_independent_siblings_do_not_correlate() -> None:
    noise = family(IndependentSiblings(), 3)
    for a, b in combinations(range(3), 2):
        assert correlation(noise[:, a], noise[:, b]) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("branches", [2, 3, 4])
def test_simplex_siblings_correlate_negatively_and_sum_to_zero(branches: int) -> None:
    noise = family(SimplexSiblings(), branches)
    for a, b in combinations(range(branches), 2):
        assert correlation(noise[:, a], noise[:, b]) == pytest.approx(-1 / (branches - 1), abs=0.01)
    assert float(noise.sum(dim=1).abs().max()) < 1e-5


def test_two_simplex_siblings_are_mirror_images() -> None:
    noise = family(SimplexSiblings(), 2)
    torch.testing.assert_close(noise[:, 0], -noise[:, 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "siblings",
    [CorrelatedSiblings(1.0), CorrelatedSiblings(4.0), IndependentSiblings(), SimplexSiblings()],
    ids=["s1", "s4", "independent", "simplex"],
)
@pytest.mark.parametrize("branches", [1, 2, 4])
def test_each_child_noise_is_standard_normal(siblings: Siblings, branches: int) -> None:
    noise = family(siblings, branches, parents=16, size=1024)
    for child in range(branches):
        sample = noise[:, child].flatten()
        assert stats.kstest(sample.numpy(), "norm").pvalue > ALPHA
        assert float(sample.var()) == pytest.approx(1, abs=0.05)


def test_shared_noise_is_fresh_per_parent_and_depth() -> None:
    strong = CorrelatedSiblings(strength=0.1)  # siblings are nearly one noise
    noise = family(strong, 2)
    assert correlation(noise[:-1, 0], noise[1:, 0]) == pytest.approx(0, abs=0.01)
    deeper = strong.draw(SOURCE, 3, 6, range(64), 2, (4096,)).view(64, 2, 4096)
    assert correlation(noise, deeper) == pytest.approx(0, abs=0.01)


def test_correlated_siblings_refuse_to_work_alone() -> None:
    with pytest.raises(ValueError, match="correlated siblings need a shared noise"):
        CorrelatedSiblings().combine(torch.zeros(1, 2, 3), None)


ADDRESS = {"seed": 42, "iteration": 7, "purpose": Purpose.EDGE, "prompt": 3, "depth": 5, "node": 2}


def draw(**changed: int) -> Tensor:
    place = ADDRESS | changed
    return NoiseSource(place["seed"], place["iteration"]).normal(
        Purpose(place["purpose"]), place["prompt"], place["depth"], [place["node"]], (2000,)
    )


@pytest.mark.parametrize(
    "changed",
    [{"seed": 43}, {"iteration": 8}, {"purpose": Purpose.SHARED}, {"prompt": 4}, {"depth": 6}, {"node": 3}],
    ids=lambda changed: next(iter(changed)),
)
def test_every_part_of_the_address_matters(changed: dict[str, int]) -> None:
    assert torch.equal(draw(), draw())
    assert abs(correlation(draw(), draw(**changed))) < 0.1  # 4.5 deviations of 2,000 independent pairs


def test_parts_of_the_address_do_not_run_into_each_other() -> None:
    parts = ("seed", "iteration", "prompt", "depth", "node")
    zero = dict.fromkeys(parts, 0)
    drawn = [draw(**(zero | {part: 1})) for part in parts]
    for first, second in combinations(drawn, 2):
        assert not torch.equal(first, second)


def test_noise_does_not_depend_on_which_nodes_are_asked_for_together() -> None:
    together = SOURCE.normal(Purpose.EDGE, 3, 5, range(6), (4, 5))
    apart = torch.cat([SOURCE.normal(Purpose.EDGE, 3, 5, [node], (4, 5)) for node in reversed(range(6))]).flip(0)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("siblings", [CorrelatedSiblings(), IndependentSiblings(), SimplexSiblings()])
def test_a_run_of_parents_gets_the_same_noise_as_in_the_whole(siblings: Siblings) -> None:
    whole = siblings.draw(SOURCE, 3, 5, range(6), 3, (8,))
    part = siblings.draw(SOURCE, 3, 5, range(2, 5), 3, (8,))
    torch.testing.assert_close(part, whole[6:15], rtol=0, atol=1e-6)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = SOURCE.normal(Purpose.EDGE, 3, 5, [2], (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(SOURCE.normal(Purpose.EDGE, 3, 5, [2], (8,)), first)


def test_an_only_child_gets_its_own_noise() -> None:
    expected = SOURCE.normal(Purpose.EDGE, 3, 5, range(4), (8,))
    for siblings in (CorrelatedSiblings(), IndependentSiblings(), SimplexSiblings()):
        assert torch.equal(siblings.draw(SOURCE, 3, 5, range(4), 1, (8,)), expected)


def test_correlated_noise_is_made_of_the_addressed_parts() -> None:
    noise = CorrelatedSiblings(2.0).draw(SOURCE, 3, 5, range(2), 3, (8,))
    own = SOURCE.normal(Purpose.EDGE, 3, 5, range(6), (8,))
    shared = SOURCE.normal(Purpose.SHARED, 3, 5, [0, 0, 0, 1, 1, 1], (8,))
    torch.testing.assert_close(noise, (shared + 2 * own) / math.sqrt(5), rtol=1e-6, atol=1e-6)


def test_one_address_never_changes_its_value() -> None:
    """Golden numbers: any change of the address, hash or generator would change every tree of every user."""
    small = SOURCE.normal(Purpose.EDGE, 3, 5, [2], (4,))
    large = SOURCE.normal(Purpose.EDGE, 3, 5, [2], (4, 4, 4)).flatten()[:4]
    torch.testing.assert_close(
        small[0], torch.tensor([-1.8888930, 0.2644619, 0.3366384, 0.7677711]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        large, torch.tensor([0.0282366, -1.1541532, -1.2724035, -0.6147258]), rtol=1e-5, atol=1e-6
    )
