"""Alarms: what they are computed from, how often they are wrong, and what a run makes of them."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guests import Outcome
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import make_plan
from training_runs import arguments

from branchtree import load_recipe, train
from branchtree.core.diversity import NUMBERS, compared_numbers, group_spread
from branchtree.core.signed_rank import MOST_EXACT, signed_rank_tail
from branchtree.core.student import change_of, contrast_of, difference_of, mean_of, student_tail
from branchtree.recipe import Recipe
from branchtree.run.directory import RunDirectory
from branchtree.training.alarm import KINDS, Alarm, AlarmWatch, spreads_by_plan
from branchtree.training.evaluation import Figure, prompt_means

WINDOW = 8


def planted(trained: str, auxiliary: str) -> dict[str, Any]:
    """A short run of the small FLUX that is trained on one of two rewards and only watches the other."""
    return {
        "rewards": [{"reward": trained}, {"reward": auxiliary, "weight": 0}],
        "tree.steps": 4,
        "tree.splits": [1],
        "tree.branches": 8,
        "tree.sde": "splits",
        "sampler.eta": 0.9,
        "batch.prompts": 4,
        "optim.lr": 4e-4,
        "alarm.window": WINDOW,
        "evaluation": None,
        "run.iterations": 2 * WINDOW,
        "run.sample_every": None,
        "run.tree_every": None,
    }


TWO: dict[str, Any] = {
    "rewards": [
        {"reward": "guest_brightness"},
        {"reward": "guest_brightness", "label": "darkness", "target": 0.0, "weight": 0},
    ],
    "alarm.window": WINDOW,
    "evaluation": None,
    "callbacks": [],
    "run.iterations": 2 * WINDOW,
    "run.checkpoint_every": 3,
    "run.sample_every": None,
    "run.tree_every": None,
}
"""A recipe of the guest's: what brightness gains, the reward of weight 0 loses."""


@pytest.fixture
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- estimates ---


@given(st.floats(-30, 30), st.integers(1, 200))
def test_the_tail_of_t_is_scipys(value: float, freedom: int) -> None:
    assert student_tail(value, freedom) == pytest.approx(stats.t.sf(value, freedom), rel=1e-6, abs=1e-13)


def test_estimates_are_those_of_scipy_and_of_least_squares() -> None:
    source = np.random.default_rng(3)
    values = source.normal(size=12) - 0.3 * np.arange(12)
    change = change_of([None, *values.tolist()[1:]])
    line = stats.linregress(np.arange(1, 12), values[1:])
    assert change is not None
    assert (change.value, change.error, change.freedom) == pytest.approx((11 * line.slope, 11 * line.stderr, 9))
    mean = mean_of(values.tolist())
    assert mean is not None
    expected = stats.ttest_1samp(values, -1.0, alternative="less")
    assert mean.probability_at(-1.0) == pytest.approx(expected.pvalue)

    others = source.normal(scale=3, size=7)
    difference = difference_of([None, *values.tolist()], others.tolist())
    welch = stats.ttest_ind(values, others, equal_var=False)
    assert difference is not None
    assert difference.value / difference.error == pytest.approx(welch.statistic)
    assert difference.freedom == int(welch.df)
    for pair in source.normal(size=(200, 2)).tolist():
        for one, other in ((pair, [0.5, 0.5, 0.5]), ([0.5, 0.5, 0.5], pair)):
            constant = difference_of(one, other)
            assert constant is not None
            assert constant.freedom == 1

    late, stratum = source.integers(2, size=40), source.integers(5, size=40)
    observed = source.normal(size=40) + 0.7 * late + stratum
    design = np.column_stack([late, *(stratum == each for each in range(5))]).astype(np.float64)
    solved, squares, rank, _ = np.linalg.lstsq(design, observed)
    error = np.sqrt(squares[0] / (40 - rank) * np.linalg.inv(design.T @ design)[0, 0])
    given_to = torch.tensor(observed), torch.tensor(late, dtype=torch.bool), torch.tensor(stratum)
    contrast = contrast_of(*given_to, strata=5)
    assert contrast is not None
    assert (contrast.value, contrast.error, contrast.freedom) == pytest.approx((solved[0], error, 40 - rank))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.floats(0.1, 3.0))
def test_a_sum_of_ranks_is_as_probable_as_the_signs_that_give_less(steps: list[int], unit: float) -> None:
    values = np.array([step for step in steps if step]) * unit
    ranks = stats.rankdata(abs(values))
    signs = np.array(list(itertools.product((0, 1), repeat=len(values))))
    sums = (signs * ranks).sum(axis=1)
    assert signed_rank_tail([step * unit for step in steps]) == pytest.approx((sums <= ranks[values > 0].sum()).mean())


def test_ranks_of_many_differences_are_judged_as_by_scipy() -> None:
    source = np.random.default_rng(1)
    for count in (MOST_EXACT, MOST_EXACT + 1, 400):
        values = source.normal(size=count) - 0.2
        expected = stats.wilcoxon(
            values, alternative="less", correction=True, method="exact" if count <= MOST_EXACT else "approx"
        )
        assert signed_rank_tail(values.tolist()) == pytest.approx(expected.pvalue)
    assert signed_rank_tail([0.0, 0.0]) == 1.0


def test_what_cannot_be_estimated_is_none() -> None:
    assert change_of([1.0, None, 2.0]) is None
    assert mean_of([1.0]) is None
    assert difference_of([1.0, None], [1.0, 2.0]) is None
    apart = torch.tensor([0, 0, 0, 1, 1, 1])
    assert contrast_of(torch.randn(6).double(), apart == 1, apart, 2) is None  # no stratum has early and late values


def test_a_total_fall_without_any_spread_is_judged_by_the_sign_test() -> None:
    falls = mean_of([-1.0] * 10)
    assert falls is not None
    assert falls.probability_at(-0.2) == pytest.approx(2.0**-10)
    assert falls.probability_at(-1.0) == 1.0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6), st.booleans())
def test_a_spread_is_the_deviation_within_a_prompt(leaves: list[int], size: int, whole: bool) -> None:
    root = torch.repeat_interleave(torch.arange(len(leaves)), torch.tensor(leaves))
    latents = torch.randn(len(root), size, 2)
    latents = latents.mul(2).round().long() if whole else latents
    found = group_spread(compared_numbers(latents), root, len(leaves))
    for prompt, count in enumerate(leaves):
        group = latents[root == prompt].reshape(count, -1)
        if count == 1:
            assert found[prompt] is None
        elif whole:
            pairs = [(group[i] != group[j]).double().mean() for i in range(count) for j in range(i)]
            assert found[prompt] == pytest.approx(float(torch.stack(pairs).mean()))
        else:
            assert found[prompt] == pytest.approx(float(group.double().var(dim=0).mean().sqrt()))


def test_of_large_latents_the_same_numbers_are_always_drawn() -> None:
    large = torch.randn(3, 5 * NUMBERS)
    assert compared_numbers(large).shape == (3, NUMBERS)
    assert compared_numbers(large[:1]).equal(compared_numbers(large)[:1])


# --- how often an alarm is wrong, and how soon it is right ---


def recipe(**changes: Any) -> Recipe:
    given_keys = {key.replace("__", "."): value for key, value in changes.items()}
    rewards = [{"reward": "digits"}, {"reward": "digits", "label": "watched", "weight": 0}]
    return load_recipe("quickstart", {"rewards": rewards, "alarm.window": WINDOW, **given_keys})


def figures(trained: float, watched: float, std: float = 1.0) -> dict[str, float]:
    return {"reward/digits/mean": trained, "reward/watched/mean": watched, "reward/watched/std": std}


def looked(settings: Recipe, watched: Iterator[float], spreads: Iterator[float], iterations: int) -> list[Alarm]:
    """The alarms of a run whose trained reward rises steadily."""
    watch = AlarmWatch(settings)
    found = []
    for i in range(iterations):
        found += watch.look(i, figures(0.1 * i, next(watched)), {"plan": [next(spreads), next(spreads)]})
    return found


def test_a_run_without_a_fall_gives_an_alarm_no_oftener_than_said() -> None:
    draw, settings, runs = random.Random(5), recipe(alarm__confidence=0.7), 60
    noise, spread = iter(lambda: draw.gauss(0, 4), None), iter(lambda: math.exp(draw.gauss(0, 0.5)), None)
    wrong = sum(bool(looked(settings, noise, spread, 8 * WINDOW)) for _ in range(runs))
    # The probability of more wrong ones than this is 1 in 1000 where the rate is that which was allowed.
    assert wrong <= stats.binom.ppf(0.999, runs, 0.3)


def test_a_trained_reward_without_a_fall_gives_an_alarm_no_oftener_than_said() -> None:
    draw, settings, runs = random.Random(6), recipe(alarm__confidence=0.7), 60
    wrong = 0
    for _ in range(runs):
        watch = AlarmWatch(settings)
        wrong += any(watch.look(i, {"reward/digits/mean": draw.gauss(0, 1)}, {}) for i in range(8 * WINDOW))
    assert wrong <= stats.binom.ppf(0.999, runs, 0.3 / KINDS)


def test_a_fall_of_an_auxiliary_reward_sets_an_alarm_off_once() -> None:
    draw = random.Random(5)
    falling = iter(lambda: draw.gauss(0, 0.5), None)
    steps = range(8 * WINDOW)
    found = looked(recipe(), (next(falling) - 0.3 * step for step in steps), iter(lambda: 1.0, None), 8 * WINDOW)
    assert [(alarm.kind, alarm.trained, alarm.reward) for alarm in found] == [("auxiliary", "digits", "watched")]
    assert found[0].iteration < 3 * WINDOW
    assert found[0].change < -1


def test_there_is_no_alarm_where_the_trained_reward_does_not_rise_or_alarms_are_off() -> None:
    for settings, rise in ((recipe(), 0.0), (recipe(alarm__enabled=False), 0.1)):
        watch = AlarmWatch(settings)
        steps = range(4 * WINDOW)
        assert not [alarm for i in steps for alarm in watch.look(i, figures(rise * i, -i + i % 2), {})]


def test_an_alarm_sets_in_again_after_it_has_ceased() -> None:
    watch, draw = AlarmWatch(recipe()), random.Random(2)
    falls = [-1.0] * WINDOW + [2.0] * 5 * WINDOW + [-2.0] * 6 * WINDOW
    level, found = 0.0, []
    for i, fall in enumerate(falls):
        level += fall + draw.gauss(0, 0.01)
        found += watch.look(i, figures(i + draw.gauss(0, 0.01), level, 0.1), {})
    assert len(found) == 2
    assert found[0].iteration == WINDOW - 1
    assert found[1].iteration >= 6 * WINDOW


def trained(values: Iterable[float], plan: Callable[[int], str] = lambda i: "plan") -> list[Alarm]:
    """The alarms of a run by its trained reward alone, whose deviation within prompts is 1."""
    watch = AlarmWatch(recipe())
    rows = ({"reward/digits/mean": value, "reward/digits/std": 1.0} for value in values)
    return [alarm for i, row in enumerate(rows) for alarm in watch.look(i, row, {plan(i): [1.0, 1.0]})]


def test_a_trained_reward_that_falls_sets_an_alarm_off_which_ceases_when_it_is_back() -> None:
    draw = random.Random(3)
    means = [0.0, 2.0, 2.0, 1.9, -1.0, -1.0, 2.0, 2.0, -1.0]
    first, second = trained(mean + draw.gauss(0, 0.1) for mean in means for _ in range(WINDOW))
    assert (first.kind, first.reward, first.iteration) == ("collapse", "digits", 5 * WINDOW - 1)
    assert first.since in (WINDOW, 2 * WINDOW)  # the best
    assert first.change == pytest.approx(-3, abs=0.2)
    assert f"lower by {-first.change:.3g} in iterations {4 * WINDOW} to {5 * WINDOW - 1}" in first.message
    assert second.iteration == 9 * WINDOW - 1
    assert not trained(2.0 - 0.15 * (i >= 3 * WINDOW) + draw.gauss(0, 0.001) for i in range(8 * WINDOW))  # a small one


def test_a_trained_reward_is_compared_where_most_trees_have_plans_that_recur() -> None:
    values = [0.0 if i < 2 * WINDOW else -3.0 for i in range(4 * WINDOW)]
    assert trained(values, lambda i: f"step {i % 3}")
    assert not trained(values, lambda i: "late" if i >= 2 * WINDOW else "early")
    assert not trained(values, lambda i: f"noise {i}")


@pytest.mark.parametrize(("recurring", "alike"), [(1, False), (3, True)])
def test_plans_are_counted_by_tree(recurring: int, alike: bool) -> None:
    watch, found = AlarmWatch(recipe()), []
    for i in range(4 * WINDOW):
        mean = 0.0 if i < 2 * WINDOW else -3.0
        spreads = {"everywhere": [1.0] * recurring, "early" if i < 2 * WINDOW else "late": [1.0]}
        found += watch.look(i, {"reward/digits/mean": mean, "reward/digits/std": 1.0}, spreads)
    assert bool(found) == alike


def test_diversity_is_compared_among_trees_of_the_same_plan() -> None:
    early, late = make_plan(4, {0: 2}), make_plan(4, {2: 2})
    draw = random.Random(7)

    def alarms(scale: float, moving: bool) -> list[Alarm]:
        watch, found = AlarmWatch(recipe()), []
        for i in range(4 * WINDOW):
            sizes = {early: 1.0, late: 0.1}  # later splits leave less apart
            plans = [late if moving and (i >= WINDOW or j) else early for j in range(2)]
            shrunk = scale if i >= WINDOW else 1.0
            spreads = [sizes[plan] * shrunk * math.exp(draw.gauss(0, 0.1)) for plan in plans]
            found += watch.look(i, figures(0, 0), spreads_by_plan(plans, spreads))
        return found

    assert not alarms(scale=1.0, moving=True)
    assert not alarms(scale=0.7, moving=False)  # not yet half
    for moving in (False, True):
        (alarm,) = alarms(scale=0.2, moving=moving)
        assert alarm.kind == "diversity"
        assert alarm.iteration == 2 * WINDOW - 1
        assert alarm.change == pytest.approx(0.2, rel=0.2)


def held_out(mean: float, prompts: int, draw: random.Random, hardness: list[float]) -> dict[str, Figure]:
    values = [mean + hard + draw.gauss(0, 0.1) for hard in hardness[:prompts]]
    return {"accuracy": Figure(sum(values) / prompts, prompts, prompts, std=0.3, prompts=values)}


@pytest.mark.parametrize("rise", [0.1, 0.0])
@pytest.mark.parametrize(("fall", "alarmed"), [(0.0, False), (0.05, False), (0.3, True)])
def test_a_fall_of_held_out_figures_is_seen_prompt_by_prompt(fall: float, alarmed: bool, rise: float) -> None:
    draw, watch = random.Random(4), AlarmWatch(recipe())
    hardness = [draw.gauss(0, 1) for _ in range(20)]  # prompts differ by far more than the fall
    found = watch.look_held_out(0, held_out(0.5, 20, draw, hardness))
    for i in range(WINDOW):
        found += watch.look(i, figures(rise * i + draw.gauss(0, 0.01), 0.0), {})
    found += watch.look_held_out(WINDOW, held_out(0.5 - fall, 20, draw, hardness))
    expected = ("held_out", "digits" if rise else "", "accuracy", WINDOW - 1)
    assert [(alarm.kind, alarm.trained, alarm.reward, alarm.iteration) for alarm in found] == [expected] * alarmed
    for alarm in found:
        cause = (
            "may please the one at the expense" if rise else f"after {WINDOW} iterations than after 0: the policy gets"
        )
        assert cause in alarm.message


def test_a_fall_of_every_prompt_is_seen_though_some_fall_by_far_more() -> None:
    draw, watch = random.Random(4), AlarmWatch(recipe())
    before = [draw.gauss(0, 1) for _ in range(30)]
    after = [value - math.exp(draw.gauss(0, 3)) for value in before]
    fall = mean_of([late - early for early, late in zip(before, after, strict=True)])
    assert fall is not None
    assert fall.probability_at(0.0) > 0.01  # by the test of t
    figure = {each: Figure(0.0, 30, 30, std=1.0, prompts=values) for each, values in enumerate((before, after))}
    assert not watch.look_held_out(0, {"accuracy": figure[0]})
    (alarm,) = watch.look_held_out(5, {"accuracy": figure[1]})
    assert (alarm.kind, alarm.change) == ("held_out", pytest.approx(fall.value))


def test_evaluations_without_a_fall_give_an_alarm_no_oftener_than_said() -> None:
    draw, settings, runs = random.Random(8), recipe(alarm__confidence=0.7), 200
    wrong = 0
    for _ in range(runs):
        watch = AlarmWatch(settings)
        hardness = [draw.gauss(0, 1) for _ in range(12)]
        wrong += any(watch.look_held_out(i, held_out(0.5, 12, draw, hardness)) for i in range(6))
    assert wrong <= stats.binom.ppf(0.999, runs, 0.3 / KINDS)


def test_a_prompts_mean_is_over_its_valid_samples() -> None:
    from branchtree.core.scores import Scores

    scores = Scores(torch.tensor([1.0, 3.0, torch.nan, 5.0]), torch.tensor([True, True, False, True]))
    assert prompt_means(scores, torch.tensor([0, 0, 1, 2]), 3) == [2.0, None, 5.0]


# --- in a run ---


def test_a_planted_hack_sets_the_alarm_off_and_the_honest_reward_does_not(
    guest: None, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    hacked, honest = tmp_path / "hacked", tmp_path / "honest"
    done = command("train", "quickstart", *arguments(planted("guest_brightness", "digits")), "--output", str(hacked))
    assert done.code == 0, done.err
    (alarm,) = rows(hacked, "alarms.jsonl")
    assert (alarm["kind"], alarm["trained"], alarm["reward"]) == ("auxiliary", "guest_brightness", "digits")
    assert (done.out + done.err).count("auxiliary reward 'digits' fell") == 1
    assert '<aside class="alarms" aria-label="Alarms">' in (hacked / "report.html").read_text()
    assert "auxiliary reward &#x27;digits&#x27; fell" in (hacked / "report.html").read_text()

    done = command("train", "quickstart", *arguments(planted("digits", "guest_brightness")), "--output", str(honest))
    assert done.code == 0, done.err
    assert "alarm" not in done.out + done.err
    assert not (honest / "alarms.jsonl").exists()
    assert '<aside class="alarms"' not in (honest / "report.html").read_text()


def test_a_run_that_is_continued_raises_the_alarms_of_one_that_was_not(guest: None, tmp_path: Path) -> None:
    train("guest", TWO, output=tmp_path / "whole")
    expected = rows(tmp_path / "whole", "alarms.jsonl")
    assert {row["kind"] for row in expected} == {"auxiliary"}
    train("guest", {**TWO, "run.iterations": WINDOW - 2}, output=tmp_path / "resumed")
    train("guest", TWO, output=tmp_path / "resumed", resume=True)
    assert rows(tmp_path / "resumed", "alarms.jsonl") == expected
    assert rows(tmp_path / "resumed", "spread.jsonl") == rows(tmp_path / "whole", "spread.jsonl")

    # A crash between an iteration's figures and its alarms.
    (tmp_path / "resumed" / "alarms.jsonl").unlink()
    settings = load_recipe("guest", TWO)
    directory = RunDirectory(tmp_path / "resumed")
    lacking = AlarmWatch(settings).recall(directory, None)
    assert [(alarm.iteration, alarm.message) for alarm in lacking] == [
        (row["iteration"], row["message"]) for row in expected
    ]


def test_nothing_is_measured_where_alarms_are_off(guest: None, tmp_path: Path) -> None:
    changed = {"alarm.enabled": False, "run.iterations": 1}
    train("guest", {**TWO, **changed}, output=tmp_path / "off")
    assert not (tmp_path / "off" / "spread.jsonl").exists()
    train("guest", {**TWO, **changed, "alarm.enabled": True}, output=tmp_path / "on")
    assert (tmp_path / "on" / "metrics.jsonl").read_bytes() == (tmp_path / "off" / "metrics.jsonl").read_bytes()
