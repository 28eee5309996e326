"""MMD^2 and KID against naive sums, torchmetrics, torch-fidelity, and laws whose MMD^2 is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from branchtree.studies.diversity import mmd
from branchtree.studies.diversity.blocks import Groups, block_mmd
from branchtree.studies.diversity.figures import compare_sets, distance_spread, pairwise_distance
from branchtree.studies.diversity.mmd import (
    FeatureKernel,
    SampleSet,
    SetSums,
    biased,
    cubic_kernel,
    draw_subsets,
    kid,
    median_bandwidth,
    pair_sums,
    rbf_kernel,
    self_sums,
    unbiased,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_sums(x: Tensor, y: Tensor, kernel: FeatureKernel, subsets: tuple[Tensor, Tensor] | None = None) -> SetSums:
    chosen = [[], []] if subsets is None else [[subsets[0]], [subsets[1]]]
    one, two = (
        SampleSet(each, torch.arange(len(each)) // 4, *given) for each, given in zip((x, y), chosen, strict=True)
    )
    return SetSums(
        pair_sums(one, one, [kernel])[0],
        pair_sums(two, two, [kernel])[0],
        pair_sums(one, two, [kernel])[0],
        self_sums(one, [kernel])[0],
        self_sums(two, [kernel])[0],
    )


def naive_kernel(name: str, x: Tensor, y: Tensor, bandwidth: float) -> float:
    if name == "cubic":
        return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True)) / (2 * bandwidth**2))


@pytest.mark.parametrize("name", ["cubic", "rbf"])
def test_estimators_equal_a_double_loop(name: str) -> None:
    x, y = drawn(13, 5), drawn(10, 5, seed=1) + 0.4
    kernel: FeatureKernel = cubic_kernel(5) if name == "cubic" else rbf_kernel(1.7)
    found = all_sums(x, y, kernel)
    k = [[[naive_kernel(name, a, b, 1.7) for b in right] for a in left] for left, right in ((x, x), (y, y), (x, y))]
    off = [sum(v for i, row in enumerate(m) for j, v in enumerate(row) if i != j) for m in k[:2]]
    whole = [sum(map(sum, m)) for m in k]
    assert unbiased(found, 13, 10) == pytest.approx(off[0] / 156 + off[1] / 90 - 2 * whole[2] / 130, abs=1e-12)
    assert biased(found, 13, 10) == pytest.approx(whole[0] / 169 + whole[1] / 100 - 2 * whole[2] / 130, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_kid_equals_torchmetrics_and_torch_fidelity(scale: float) -> None:
    kernel_inception = pytest.importorskip("torchmetrics.image.kid")
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = scale * drawn(150, 64).abs(), scale * (drawn(150, 64, seed=1).abs() + 0.05)
    ours = unbiased(all_sums(x, y, cubic_kernel(64)), 150, 150)
    assert ours == pytest.approx(float(kernel_inception.poly_mmd(x, y)), rel=1e-10, abs=1e-8)
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    theirs = fidelity.kernel_mmd(x.numpy(), y.numpy(), **options, kid_kernel_poly_coef0=1.0)
    assert ours == pytest.approx(float(theirs), rel=1e-10, abs=1e-8)


def test_subsets_equal_torchmetrics_on_each() -> None:
    kernel_inception = pytest.importorskip("torchmetrics.image.kid")
    x, y = drawn(90, 16), drawn(90, 16, seed=1) * 1.2
    chosen = draw_subsets(90, 40, 7, seed=3), draw_subsets(90, 40, 7, seed=4)
    found = kid(all_sums(x, y, cubic_kernel(16), chosen), 40)
    each = torch.stack([kernel_inception.poly_mmd(x[a], y[b]) for a, b in zip(*chosen, strict=True)])
    assert found is not None
    assert (found.mean, found.std) == pytest.approx((float(each.mean()), float(each.std(correction=0))), abs=1e-8)
    assert (found.subsets, found.size) == (7, 40)
    assert all(len(set(subset.tolist())) == 40 for subset in chosen[0])


def test_the_rbf_kernel_equals_torch_fidelitys() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = drawn(60, 8), drawn(60, 8, seed=1) + 0.3
    theirs = fidelity.kernel_mmd(x.numpy(), y.numpy(), kid_kernel="rbf", kid_kernel_rbf_sigma=2.5)
    assert unbiased(all_sums(x, y, rbf_kernel(2.5)), 60, 60) == pytest.approx(float(theirs), abs=1e-8)


def test_blocks_of_rows_and_the_order_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = drawn(40, 6), drawn(40, 6, seed=1)
    before = all_sums(x, y, cubic_kernel(6))
    monkeypatch.setattr(mmd, "ROWS", 7)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    after, shuffled = all_sums(x, y, cubic_kernel(6)), all_sums(x[order], y[order.flip(0)], cubic_kernel(6))
    torch.testing.assert_close(after.between.groups, before.between.groups)
    for estimate in (unbiased, biased):
        assert estimate(shuffled, 40, 40) == pytest.approx(estimate(before, 40, 40), abs=1e-12)


def test_equal_sets_have_a_biased_estimate_of_0_and_an_unbiased_one_below() -> None:
    x = drawn(30, 4)
    found = all_sums(x, x, rbf_kernel(1.0))
    assert biased(found, 30, 30) == pytest.approx(0, abs=1e-14)
    # With k(x, x) = 1 and the mean kernel value m over all pairs: 2 (n^2 m - n) / (n (n - 1)) - 2 m.
    mean = float(torch.exp(-torch.cdist(x, x).square() / 2).mean())
    assert unbiased(found, 30, 30) == pytest.approx(2 * (30 * mean - 1) / 29 - 2 * mean, abs=1e-12)


def test_the_bandwidth_is_the_median_distance_and_never_0() -> None:
    x = torch.tensor([[0.0], [1.0], [5.0]])
    assert median_bandwidth([x]) == 4.0  # of 1, 4, 5
    assert median_bandwidth([torch.zeros(5, 1), torch.ones(1, 1)]) == pytest.approx(5 / 15)
    assert median_bandwidth([torch.zeros(4, 2)]) == 1.0


def test_pairs_within_a_group_are_left_out_and_prompts_keep_their_parts() -> None:
    prompt_x, prompt_y = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1, 1, 0, 0])
    x, y = drawn(5, 3, 2), drawn(5, 3, 2, seed=1)

    def mean_kernel(one: Tensor, two: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one.flatten(0, 1), two.flatten(0, 1))).view(5, 3, 5, 3).mean(dim=(1, 3))

    xx, yy, xy = mean_kernel(x, x), mean_kernel(y, y), mean_kernel(x, y)
    share, expected = (0.6, 0.4), 0.0
    sides = {"x": prompt_x.tolist(), "y": prompt_y.tolist()}
    for p, q in itertools.product((0, 1), repeat=2):
        for first, second, kernel, sign in (("x", "x", xx, 1), ("y", "y", yy, 1), ("x", "y", xy, -2)):
            values = [
                float(kernel[a, b])
                for a, b in itertools.product(range(5), repeat=2)
                if sides[first][a] == p and sides[second][b] == q and not (first == second and a == b)
            ]
            expected += sign * share[p] * share[q] * sum(values) / len(values)
    assert block_mmd(xx, yy, xy, Groups(prompt_x, prompt_y)).value == pytest.approx(expected, abs=1e-12)


def test_groups_must_be_dealt_alike_and_repeat_each_prompt() -> None:
    with pytest.raises(ValueError, match="same proportions"):
        Groups(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="at least two groups"):
        Groups(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))


WIDTH, DIMENSION, GROUP = 2.0, 4, 4  # the RBF bandwidth, D, K
PROMPTS = torch.randn(8, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian_kernel_mean(offset: Tensor) -> Tensor:
    """E exp(-|z|^2 / (2 h^2)) for z ~ N(offset, 2 I): what a pair of independent samples has."""
    inside = WIDTH**2 + 2
    return (WIDTH**2 / inside) ** (DIMENSION / 2) * torch.exp(-offset.square().sum(dim=-1) / (2 * inside))


def known_mmd(shift: float) -> float:
    offset = PROMPTS[:, None] - PROMPTS
    moved = offset + shift * torch.eye(DIMENSION, dtype=torch.float64)[0]
    return float(2 * gaussian_kernel_mean(offset).mean() - 2 * gaussian_kernel_mean(moved).mean())


def simulated(prompt: Tensor, shift: float, shared: float, source: torch.Generator) -> Tensor:
    """Groups (G, K, D) of N(prompt + shift, I) whose samples share a part of their variance."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    noise = math.sqrt(shared) * normal(len(prompt), 1, DIMENSION)
    noise = noise + math.sqrt(1 - shared) * normal(len(prompt), GROUP, DIMENSION)
    return PROMPTS[prompt][:, None] + shift * torch.eye(DIMENSION, dtype=torch.float64)[0] + noise


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_the_interval_covers_the_known_mmd_and_the_estimate_is_unbiased(shift: float) -> None:
    truth, trials, source = known_mmd(shift), 200, torch.Generator().manual_seed(1)
    prompt = torch.arange(40) % len(PROMPTS)
    values, covered = [], 0
    for trial in range(trials):
        x = simulated(prompt, 0.0, 0.6, source)
        y = simulated(prompt, shift, 0.2, source)
        both = torch.cat([x, y]).flatten(0, 1)
        kernel = torch.exp(-torch.cdist(both, both).square() / (2 * WIDTH**2))
        means = kernel.view(80, GROUP, 80, GROUP).mean(dim=(1, 3))
        found = block_mmd(means[:40, :40], means[40:, 40:], means[:40, 40:], Groups(prompt, prompt), trial, draws=300)
        values.append(found.value)
        covered += found.low <= truth <= found.high
    estimates = torch.tensor(values)
    # 3.3 standard errors: a right test fails once in a thousand seeds.
    assert abs(float(estimates.mean()) - truth) < 3.3 * float(estimates.std()) / math.sqrt(trials)
    assert covered / trials > 0.95 - 3.3 * math.sqrt(0.95 * 0.05 / trials)


def test_the_usual_unbiased_estimate_rises_with_what_a_group_shares() -> None:
    source, values, groups = torch.Generator().manual_seed(2), [], []
    prompt = torch.zeros(12, dtype=torch.int64)
    for _ in range(150):
        x, y = (simulated(prompt, 0.0, 0.6, source).flatten(0, 1) for _ in range(2))
        values.append(unbiased(all_sums(x, y, rbf_kernel(WIDTH)), 48, 48))
        sums = all_sums(x, y, rbf_kernel(WIDTH))
        means = [part.groups / GROUP**2 for part in (sums.within_x, sums.within_y, sums.between)]
        groups.append(block_mmd(*means, Groups(prompt, prompt), draws=10).value)
    # Pairs of a group differ by N(0, 2 (1 - shared) I), and are 3 of each sample's 47 pairs, on both sides.
    alike = (WIDTH**2 / (WIDTH**2 + 2 * 0.4)) ** (DIMENSION / 2)
    excess = alike - float(gaussian_kernel_mean(torch.zeros(DIMENSION, dtype=torch.float64)))
    found = torch.tensor(values)
    error = float(found.std()) / math.sqrt(150)
    assert abs(float(found.mean()) - 2 * 3 / 47 * excess) < 3.3 * error
    assert float(found.mean()) > 5 * error
    assert abs(float(torch.tensor(groups).mean())) < 3.3 * float(torch.tensor(groups).std()) / math.sqrt(150)


def test_sets_are_compared_in_pairs_by_both_kernels() -> None:
    sets = {"one": drawn(32, 3).float(), "two": drawn(32, 3, seed=1).float(), "far": drawn(32, 3, seed=2).float() + 2}
    prompt = torch.arange(8) % 4
    found = compare_sets("space", sets, [("one", "two"), ("far", "two")], prompt, 4, seed=0)
    assert [(one.first, one.second, one.kernel) for one in found] == [
        ("one", "two", "cubic"),
        ("one", "two", "rbf"),
        ("far", "two", "cubic"),
        ("far", "two", "rbf"),
    ]
    assert all(one.kid is None for one in found)  # 32 samples are fewer than one subset
    assert {one.bandwidth for one in found if one.kernel == "rbf"} == {median_bandwidth(list(sets.values()))}
    assert found[3].groups.low > 0 > found[1].groups.low
    again = compare_sets("space", sets, [("one", "two")], prompt, 4, seed=0)[0]
    assert again == found[0]


def test_the_distance_within_groups_is_the_mean_over_pairs() -> None:
    samples = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    found = pairwise_distance(samples)
    # Root mean squares over two numbers: sqrt(2), sqrt(2) and 2.
    assert found.tolist() == pytest.approx([(2 * math.sqrt(2) + 2) / 3, 0.0])
    whole = distance_spread(found)
    assert whole is not None
    assert whole.mean == pytest.approx((math.sqrt(2) + 1) / 3)
    assert whole.error == pytest.approx((math.sqrt(2) + 1) / 3)  # half the difference of two groups
    assert distance_spread(pairwise_distance(torch.zeros(2, 1, 3))) is None
