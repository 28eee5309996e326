"""Plans: counts, windows, drawn splits, and every refusal."""

from __future__ import annotations

from collections import Counter

import pytest
import strategies
from hypothesis import given

from branchtree.core.schedule import PRESET_SPLITS, DrawnSplits, FixedSplits, Schedule, SlidingWindow, TreePlan


def preset(name: str, branches: int = 2, sde: str | SlidingWindow = "all") -> TreePlan:
    splits = PRESET_SPLITS[name]
    return Schedule(20, FixedSplits(splits, (branches,) * len(splits)), sde).plan(0, 0)


@pytest.mark.parametrize(
    ("name", "nodes", "paper_nfe"), [("dense", 219, 13.68), ("mixed", 185, 11.56), ("sparse", 151, 9.44)]
)
def test_preset_counts(name: str, nodes: int, paper_nfe: float) -> None:
    plan = preset(name)
    assert sum(plan.widths) == nodes
    assert plan.leaves == 16
    # The paper cuts its figures to two decimals or rounds them; both lie within 0.01.
    assert nodes / plan.leaves == pytest.approx(paper_nfe, abs=0.01)


@pytest.mark.parametrize(("branches", "leaves"), [(2, 16), (3, 81), (4, 256)])
def test_scaling_in_branches(branches: int, leaves: int) -> None:
    assert preset("dense", branches).leaves == leaves


@pytest.mark.parametrize(("splits", "leaves"), [((0, 3, 6), 8), ((0, 3, 6, 9), 16), ((0, 3, 6, 9, 12), 32)])
def test_scaling_in_splits(splits: tuple[int, ...], leaves: int) -> None:
    plan = Schedule(20, FixedSplits(splits, (2,) * len(splits))).plan(0, 0)
    assert plan.leaves == leaves
    assert plan.splits == splits
    assert plan.last_split == splits[-1]


def test_a_tree_that_never_splits_has_no_last_split() -> None:
    plan = Schedule(5, FixedSplits((), ())).plan(0, 0)
    assert (plan.splits, plan.last_split, plan.leaves) == ((), -1, 1)


def test_every_step_but_the_last_is_stochastic() -> None:
    plan = preset("dense")
    assert plan.stochastic == (True,) * 19 + (False,)
    assert plan.trained == plan.stochastic


def test_only_splits_are_stochastic_when_asked() -> None:
    plan = preset("mixed", sde="splits")
    assert [step for step, flag in enumerate(plan.stochastic) if flag] == [0, 4, 8, 12]
    assert plan.trained == plan.stochastic


@pytest.mark.parametrize(
    ("iteration", "stochastic"),
    [
        (0, [0, 1, 2, 3, 6, 9]),
        (29, [0, 1, 2, 3, 6, 9]),
        (30, [0, 1, 2, 3, 4, 6, 9]),
        (150, [0, 3, 5, 6, 7, 8, 9]),
        (480, [0, 3, 6, 9, 16, 17, 18]),  # the last step stays deterministic inside the window
        (10_000, [0, 3, 6, 9, 16, 17, 18]),
    ],
)
def test_the_mix_window_slides_one_step_every_30_iterations(iteration: int, stochastic: list[int]) -> None:
    schedule = Schedule(20, FixedSplits((0, 3, 6, 9), (2,) * 4), SlidingWindow(4, 0, 30, 16))
    plan = schedule.plan(iteration, 0)
    assert [step for step, flag in enumerate(plan.stochastic) if flag] == stochastic
    assert plan.trained == plan.stochastic


def test_a_window_stops() -> None:
    window = SlidingWindow(size=4, start=9, every=30, stop=15)
    assert [window.steps(i).start for i in (0, 29, 30, 179, 180, 5000)] == [9, 9, 10, 14, 15, 15]
    assert all(len(window.steps(i)) == 4 for i in (0, 180, 5000))


def test_drawn_splits_are_even_and_addressed() -> None:
    splits = DrawnSplits(first=6, last=15, branches=16, seed=42)
    drawn = [splits.factors(iteration, prompt) for iteration in range(50) for prompt in range(100)]
    assert drawn == [splits.factors(iteration, prompt) for iteration in range(50) for prompt in range(100)]
    counts = Counter(step for factors in drawn for step in factors)
    assert set(counts) == set(range(6, 16))
    # 5,000 draws over 10 steps: 500 each with deviation 21; 5 deviations fail once in 170,000 such tests.
    assert all(abs(count - 500) < 5 * 21.3 for count in counts.values())
    assert all(list(factors.values()) == [16] for factors in drawn)


@pytest.mark.parametrize("other", [{"seed": 43}, {"iteration": 1}, {"prompts": range(100, 200)}])
def test_drawn_splits_depend_on_seed_iteration_and_prompt(other: dict[str, object]) -> None:
    def draws(seed: int = 42, iteration: int = 0, prompts: range = range(100)) -> list[dict[int, int]]:
        splits = DrawnSplits(first=6, last=15, branches=16, seed=seed)
        return [splits.factors(iteration, prompt) for prompt in prompts]

    assert draws() != draws(**other)  # type: ignore[arg-type]


def test_drawn_splits_never_change_silently() -> None:
    """Golden draws: a run that resumes under a later version must grow the same trees."""
    splits = DrawnSplits(first=6, last=15, branches=16, seed=42)
    assert [next(iter(splits.factors(3, prompt))) for prompt in range(8)] == [6, 13, 10, 12, 13, 6, 12, 15]


@given(strategies.batches())
@strategies.thorough
def test_widths_multiply(plans: tuple[TreePlan, ...]) -> None:
    for plan in plans:
        width = 1
        for depth in range(plan.steps):
            assert plan.widths[depth] == width
            width *= plan.factors[depth]
        assert plan.leaves == width


@pytest.mark.parametrize("step", [-1, 19, 20])
def test_a_split_outside_the_grid_is_refused(step: int) -> None:
    schedule = Schedule(20, FixedSplits((0, step), (2, 2)))
    with pytest.raises(ValueError, match=rf"split step {step} lies outside the grid.*steps 0 to 18 can split"):
        schedule.plan(0, 0)


@pytest.mark.parametrize("branches", [1, 0, -2])
def test_a_split_into_fewer_than_two_is_refused(branches: int) -> None:
    schedule = Schedule(20, FixedSplits((3,), (branches,)))
    with pytest.raises(ValueError, match=f"split step 3 has branch factor {branches}; .* at least 2"):
        schedule.plan(0, 0)


def test_splits_need_one_factor_each() -> None:
    with pytest.raises(ValueError, match="2 split steps need as many branch factors, not 1"):
        FixedSplits((0, 3), (2,))


@pytest.mark.parametrize(
    ("factors", "stochastic", "trained", "message"),
    [
        ((), (), (), "at least one"),
        ((2, 1), (True,), (True, False), "one entry per step"),
        ((1, 1), (True, True), (True, False), "the last step is deterministic"),
        ((0, 1), (True, False), (True, False), "step 0 gives each node 0 children"),
        ((1, 2, 1), (True, False, False), (True, False, False), "step 1 splits, so it must be stochastic"),
        ((1, 1, 1), (True, False, False), (True, True, False), "step 1 is deterministic, so it cannot be trained"),
    ],
)
def test_a_bad_plan_is_refused(
    factors: tuple[int, ...], stochastic: tuple[bool, ...], trained: tuple[bool, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TreePlan(factors, stochastic, trained)


@pytest.mark.parametrize(("size", "start", "every", "stop"), [(0, 0, 1, 0), (1, 0, 0, 0), (1, -1, 1, 0), (1, 3, 1, 2)])
def test_a_bad_window_is_refused(size: int, start: int, every: int, stop: int) -> None:
    message = f"not a window: size {size}, start {start}, every {every}, stop {stop}"
    with pytest.raises(ValueError, match=message):
        SlidingWindow(size, start, every, stop)
