"""Time grids: the shift's formula, its fixed points, and what is refused."""

from __future__ import annotations

import pytest
import torch

from branchtree.core.grid import check_grid, shift_sigmas, time_grid


def test_a_plain_grid_is_linear() -> None:
    grid = time_grid(4)
    assert grid.dtype == torch.float32
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
def test_the_shift_follows_its_formula(shift: float) -> None:
    expected = []
    for i in range(21):
        sigma = 1 - i / 20
        expected.append(shift * sigma / (1 + (shift - 1) * sigma))
    grid = time_grid(20, shift)
    torch.testing.assert_close(grid, torch.tensor(expected), rtol=1e-6, atol=0)
    assert grid[0] == 1 and grid[-1] == 0
    check_grid(grid)


def test_image_recipes_spend_more_steps_at_high_noise() -> None:
    assert float(shift_sigmas(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match=f"shift must be positive, not {shift}"):
        shift_sigmas(torch.ones(1), shift)


def test_a_grid_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step, not 0"):
        time_grid(0)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], r"at least two noise levels, not \(1,\)"),
        ([[1.0, 0.0]], r"at least two noise levels, not \(1, 2\)"),
        ([1.0, 0.5, 0.5, 0.0], "must fall strictly"),
        ([0.0, 1.0], "must fall strictly"),
        ([1.0, float("nan"), 0.0], "must fall strictly"),
        ([1.5, 0.0], "from at most 1 to 0, not 1.5 to 0.0"),
        ([1.0, 0.25], "from at most 1 to 0, not 1.0 to 0.25"),
    ],
)
def test_a_bad_grid_is_refused(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(sigmas))


def test_a_grid_may_start_below_1() -> None:
    check_grid(torch.tensor([0.98, 0.5, 0.0]))
