"""Each kernel against the written formula in double precision, and against exactly known laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from branchtree.core.gaussian import CpsSde, DanceSde, Ddim, FlowSde, GaussianTransition
from branchtree.core.grid import time_grid
from branchtree.core.transitions import Kernel

SHAPE = (3, 4, 5)

KERNELS: list[tuple[Kernel, reference.Step]] = [
    (DanceSde(0.3), reference.dance(0.3)),
    (DanceSde(1.0), reference.dance(1.0)),
    (FlowSde(0.7), reference.flow(0.7)),
    (CpsSde(0.7), reference.cps(0.7)),
    (CpsSde(1.0), reference.cps(1.0)),
    (Ddim(1.0, "noise"), reference.ddim(1.0, "noise")),
    (Ddim(0.6, "noise"), reference.ddim(0.6, "noise")),
    (Ddim(1.0, "v"), reference.ddim(1.0, "v")),
    (Ddim(0.6, "v"), reference.ddim(0.6, "v")),
]
STOCHASTIC: list[Kernel] = [kernel for kernel, _ in KERNELS]
FLOW_MATCHING: list[Kernel] = [DanceSde(0.3), FlowSde(0.7), CpsSde(0.7)]


def name(value: object) -> str:
    return repr(value) if isinstance(value, DanceSde | FlowSde | CpsSde | Ddim) else "formula"


def states(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, *SHAPE, generator=generator),
        torch.randn(rows, *SHAPE, generator=generator),
    )


def levels(kernel: Kernel, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Every step of a shifted grid; from below 1 where a noise prediction says nothing at 1."""
    grid = time_grid(steps, 3.0)
    if isinstance(kernel, Ddim) and kernel.prediction == "noise":
        grid[0] = 0.995
    return grid[:-1], grid[1:]


@pytest.mark.parametrize(("kernel", "step"), KERNELS, ids=name)
@pytest.mark.parametrize("active", [True, False])
def test_kernels_follow_their_formula(kernel: Kernel, step: reference.Step, active: bool) -> None:
    """Every step of the grid in one batch, the first (sigma = 1) and last (to 0) included."""
    sigma, sigma_next = levels(kernel)
    latents, prediction = states(len(sigma))
    result = kernel(latents, prediction, sigma, sigma_next, torch.full((len(sigma),), active))
    mean, std = torch.empty_like(latents, dtype=torch.float64), torch.empty(len(sigma), dtype=torch.float64)
    for row in range(len(sigma)):
        here, there = float(sigma[row]), float(sigma_next[row])
        for place in torch.cartesian_prod(*(torch.arange(n) for n in SHAPE)).tolist():
            at = (row, *place)
            mean[at], std[row] = step(float(latents[at]), float(prediction[at]), here, there, active)
    assert result.mean.dtype == result.std.dtype == torch.float32
    torch.testing.assert_close(result.mean.double(), mean, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.std.flatten().double(), std, rtol=2e-5, atol=1e-7)
    assert result.std.shape == (len(sigma), 1, 1, 1)


def test_worked_numbers() -> None:
    """By hand, at x = 2, v = 1, sigma 0.8 to 0.5: x1 = 2.2, score = -2.75, D = -0.3, x0 = 1.2."""

    def only(kernel: Kernel) -> tuple[float, float]:
        at = torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([0.8]), torch.tensor([0.5])
        result = kernel(*at, torch.tensor([True]))
        return float(result.mean), float(result.std)

    assert only(DanceSde(0.4)) == pytest.approx((2 - 0.3 * (1 + 0.08 * 2.75), 0.4 * math.sqrt(0.3)))
    assert only(FlowSde(0.4)) == pytest.approx((2 - 0.3 * (1 + 0.32 * 2.75), 0.8 * math.sqrt(0.3)))
    assert only(CpsSde(1 / 3)) == pytest.approx((0.6 + 0.5 * math.sqrt(0.75) * 2.2, 0.25))


def test_flow_noise_level_at_sigma_1_uses_the_next_level() -> None:
    latents, velocity = states(1)
    result = FlowSde(0.7)(latents, velocity, torch.ones(1), torch.tensor([0.9]), torch.ones(1, dtype=torch.bool))
    assert float(result.std) == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), rel=1e-5)
    assert bool(result.mean.isfinite().all())


@pytest.mark.parametrize("kernel", [DanceSde(0.3), FlowSde(0.7)], ids=name)
def test_inactive_rows_take_the_ode_step_to_the_bit(kernel: Kernel) -> None:
    sigma, sigma_next = levels(kernel)
    latents, velocity = states(len(sigma))
    active = torch.arange(len(sigma)) % 3 == 0
    active[-1] = False
    mixed = kernel(latents, velocity, sigma, sigma_next, active)
    euler = latents + velocity * (sigma_next - sigma).view(-1, 1, 1, 1)
    assert torch.equal(mixed.mean[~active], euler[~active])
    assert float(mixed.std[~active].abs().max()) == 0
    assert bool((mixed.std[active] > 0).all())
    assert not torch.equal(mixed.mean[active], euler[active])


@pytest.mark.parametrize("kernel", FLOW_MATCHING, ids=name)
def test_every_flow_kernel_without_noise_is_euler(kernel: Kernel) -> None:
    sigma, sigma_next = levels(kernel)
    latents, velocity = states(len(sigma))
    result = kernel(latents, velocity, sigma, sigma_next, torch.zeros(len(sigma), dtype=torch.bool))
    step = (sigma_next - sigma).view(-1, 1, 1, 1)
    torch.testing.assert_close(result.mean, latents + step * velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("noisy", "still"),
    [
        (DanceSde(0.0), DanceSde(0.3)),
        (FlowSde(0.0), FlowSde(0.7)),
        (CpsSde(0.0), CpsSde(0.7)),
        (Ddim(0.0, "v"), Ddim(1.0, "v")),
    ],
    ids=name,
)
def test_eta_0_is_the_deterministic_step(noisy: Kernel, still: Kernel) -> None:
    sigma, sigma_next = levels(noisy)
    latents, velocity = states(len(sigma))
    active = torch.ones(len(sigma), dtype=torch.bool)
    result = noisy(latents, velocity, sigma, sigma_next, active)
    expected = still(latents, velocity, sigma, sigma_next, ~active)
    assert torch.equal(result.mean, expected.mean)
    assert float(result.std.abs().max()) == 0
    assert torch.equal(result.log_prob(result.mean + 1), torch.zeros(len(sigma)))


@pytest.mark.parametrize("kernel", STOCHASTIC, ids=name)
def test_the_last_step_gives_exactly_the_clean_estimate(kernel: Kernel) -> None:
    latents, prediction = states(4)
    sigma = torch.tensor([0.9, 0.5, 0.25, 0.01])
    result = kernel(latents, prediction, sigma, torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    here = sigma.view(-1, 1, 1, 1)
    clean = latents - here * prediction
    if isinstance(kernel, Ddim):
        alpha = (1 - here.square()).sqrt()
        clean = clean / alpha if kernel.prediction == "noise" else alpha * latents - here * prediction
    assert torch.equal(result.sample(torch.full_like(latents, 7.0)), clean)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_the_gaussian_one(reduction: str) -> None:
    mean, other = states(5)
    std = torch.tensor([0.01, 0.1, 1.0, 3.0, 0.0]).view(-1, 1, 1, 1)
    following = mean + std * other
    transition = GaussianTransition(mean, std)
    expected = Normal(mean.double(), std.clamp_min(1e-9).double()).log_prob(following.double()).flatten(1)
    expected = expected.mean(dim=1) if reduction == "mean" else expected.sum(dim=1)
    expected[-1] = 0
    result = transition.log_prob(following, reduction)  # type: ignore[arg-type]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_the_gaussian_one(reduction: str) -> None:
    mean, other = states(4)
    std = torch.tensor([0.1, 1.0, 3.0, 0.0]).view(-1, 1, 1, 1)
    wide = std.clamp_min(1e-9).expand_as(mean)
    expected = kl_divergence(Independent(Normal(mean, wide), 3), Independent(Normal(other, wide), 3))
    if reduction == "mean":
        expected = expected / mean[0].numel()
    expected[-1] = 0
    result = GaussianTransition(mean, std).kl(GaussianTransition(other, std), reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(result, expected)


def test_log_prob_defaults_to_the_mean_over_dimensions() -> None:
    mean, following = states(2)
    transition = GaussianTransition(mean, torch.ones(2, 1, 1, 1))
    assert torch.equal(transition.log_prob(following), transition.log_prob(following, "mean"))
    torch.testing.assert_close(transition.log_prob(following) * math.prod(SHAPE), transition.log_prob(following, "sum"))


def test_a_deterministic_row_sends_no_gradient() -> None:
    """A masked 0/0 in the density of a deterministic row would turn all gradients of its batch to NaN."""
    mean, following = states(2)
    mean.requires_grad_()
    GaussianTransition(mean, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).log_prob(following).sum().backward()
    assert mean.grad is not None
    assert torch.equal(mean.grad[0], torch.zeros(SHAPE))
    assert float(mean.grad[1].abs().min()) > 0


def test_a_sample_is_mean_plus_std_times_noise() -> None:
    mean, noise = states(2)
    transition = GaussianTransition(mean, torch.tensor([0.0, 2.0]).view(2, 1, 1, 1))
    assert torch.equal(transition.sample(noise)[0], mean[0])
    assert torch.equal(transition.sample(noise)[1], mean[1] + 2 * noise[1])


def test_rows_repeat_a_parent_for_its_children() -> None:
    mean, _ = states(3)
    std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    spread = GaussianTransition(mean, std).rows(torch.tensor([0, 0, 2]))
    assert torch.equal(spread.mean, mean[[0, 0, 2]])
    assert torch.equal(spread.std, std[[0, 0, 2]])


# Data that is Gaussian has an affine optimal prediction, so each kernel is affine in the state and the mean and
# variance of every depth follow an exact recursion. No sampling is needed to see whether marginals are kept.

DATA_MEAN, DATA_STD = 1.5, 0.5


def flow_velocity(x: float, sigma: float) -> float:
    """E[x1 - x0 | x] for x = (1 - sigma) x0 + sigma x1."""
    variance = ((1 - sigma) * DATA_STD) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * DATA_STD**2) / variance
    return -DATA_MEAN + slope * (x - (1 - sigma) * DATA_MEAN)


def vp_v(x: float, sigma: float) -> float:
    """E[alpha * noise - sigma * x0 | x] for x = alpha * x0 + sigma * noise."""
    alpha = math.sqrt(1 - sigma**2)
    variance = (alpha * DATA_STD) ** 2 + sigma**2
    slope = alpha * sigma * (1 - DATA_STD**2) / variance
    return -sigma * DATA_MEAN + slope * (x - alpha * DATA_MEAN)


def leaf_law(kernel: Kernel, predict: Callable[[float, float], float], steps: int) -> tuple[float, float]:
    """Exact mean and deviation of a plain chain's last state, through the library's own kernel."""
    grid = time_grid(steps)
    mean, variance = 0.0, 1.0
    for step in range(steps):
        here, there = float(grid[step]), float(grid[step + 1])
        ends = torch.tensor([[0.0], [1.0]])
        prediction = torch.tensor([[predict(0.0, here)], [predict(1.0, here)]])
        moved = kernel(
            ends,
            prediction,
            torch.full((2,), here),
            torch.full((2,), there),
            torch.full((2,), step < steps - 1),
        )
        offset, slope = float(moved.mean[0]), float(moved.mean[1] - moved.mean[0])
        mean = offset + slope * mean
        variance = slope**2 * variance + float(moved.std[0]) ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(
    ("kernel", "predict"),
    [
        (DanceSde(0.3), flow_velocity),
        (DanceSde(1.0), flow_velocity),
        (Ddim(0.5, "v"), vp_v),
        (Ddim(1.0, "v"), vp_v),
    ],
    ids=["dance0.3", "dance1", "ddim0.5", "ddim1"],
)
def test_kernels_keep_the_data_law_as_steps_shrink(kernel: Kernel, predict: Callable[[float, float], float]) -> None:
    """A wrong sign or factor in drift or noise would leave an error that finer grids do not remove."""
    errors = []
    for steps in (100, 400):
        mean, std = leaf_law(kernel, predict, steps)
        assert mean == pytest.approx(DATA_MEAN, abs=1e-3)
        errors.append(abs(std - DATA_STD))
    assert errors[1] < 0.005
    assert errors[1] < 0.3 * errors[0]


def test_flow_noise_nearly_keeps_the_data_law() -> None:
    """Its first step has finite noise on any grid (g^2 * D = eta^2), so the error falls, but not as 1 / T."""
    for steps in (100, 400):
        assert leaf_law(FlowSde(0.7), flow_velocity, steps) == pytest.approx((DATA_MEAN, DATA_STD), abs=2e-3)


def test_cps_keeps_the_mean_and_narrows_the_law() -> None:
    """Its noise per step does not shrink with the step, so its law is its own, on a fine grid too."""
    mean, std = leaf_law(CpsSde(0.7), flow_velocity, 400)
    assert mean == pytest.approx(DATA_MEAN, abs=1e-3)
    assert std == pytest.approx(0.423, abs=0.005)
