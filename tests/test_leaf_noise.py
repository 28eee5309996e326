"""The noise that a recipe injects into a leaf, the spread of rewards within prompts, and what is said of either."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import metrics

from branchtree import load_recipe, plan
from branchtree.core.injection import leaf_noise
from branchtree.core.schedule import DrawnSplits, FixedSplits, Schedule, TreePlan
from branchtree.planning.noise import planned_noise
from branchtree.recipe import Recipe
from branchtree.recipe.build import make_schedule
from branchtree.training.metrics import spread_ratio
from branchtree.training.spread import LEAST_SPREAD, WATCHED, SpreadWatch

QUICK = ["batch.prompts=4", "evaluation=null", "run.sample_every=null", "run.tree_every=null"]


@pytest.fixture
def run(
    examples_site: Path, plug: Callable[[Path], None], command: Callable[..., Outcome]
) -> Callable[..., tuple[str, str]]:
    """Run a command that succeeds; what it prints and what it logs, each on one line."""
    plug(examples_site)

    def result(*words: str) -> tuple[str, str]:
        outcome = command(*words)
        assert outcome.code == 0, outcome.err
        return " ".join(outcome.out.split()), " ".join(outcome.err.split())

    return result


# The noise of a leaf


def grid(recipe: Recipe) -> list[float]:
    linear = [1 - i / recipe.tree.steps for i in range(recipe.tree.steps + 1)]
    shift = recipe.sampler.shift
    return [shift * t / (1 + (shift - 1) * t) for t in linear]


def step_std(recipe: Recipe, here: float, there: float) -> float:
    """By the formulas of the page on concepts."""
    eta, step = recipe.sampler.eta, here - there
    if recipe.sampler.kind == "cps":
        return there * math.sin(math.pi / 2 * eta)
    if recipe.sampler.kind == "flow":
        return eta * math.sqrt(here / (1 - (there if here == 1 else here))) * math.sqrt(step)
    return eta * math.sqrt(step)


def naive(recipe: Recipe, plans: list[TreePlan]) -> tuple[float, float]:
    levels, totals, differing = grid(recipe), [], []
    for each in plans:
        stds = {i: step_std(recipe, levels[i], levels[i + 1]) for i in range(each.steps) if each.stochastic[i]}
        first = min(i for i, factor in enumerate(each.factors) if factor > 1)
        totals.append(math.hypot(*stds.values()))
        differing.append(math.hypot(*(std for i, std in stds.items() if i >= first)))
    return statistics.fmean(totals), statistics.fmean(differing)


@pytest.mark.parametrize("kernel", [{}, {"sampler.kind": "flow"}, {"sampler.kind": "cps"}])
@pytest.mark.parametrize(
    ("tree", "stochastic"),
    [
        ({}, 19),
        ({"tree.splits": [4, 8]}, 19),
        ({"tree.splits": [4], "tree.sde": "splits"}, 1),
        ({"tree.splits": [2, 5], "tree.sde": "window", "tree.window.size": 4, "run.iterations": 90}, None),
    ],
)
def test_a_plans_noise_is_the_naive_sum(tree: dict[str, Any], stochastic: int | None, kernel: dict[str, Any]) -> None:
    """Over every iteration's tree: a window moves, so that its noise is a mean over where it has been."""
    recipe = load_recipe("quickstart", {**tree, **kernel})
    schedule = make_schedule(recipe)
    plans = [schedule.plan(iteration, 0) for iteration in range(recipe.run.iterations)]
    assert stochastic is None or {sum(each.stochastic) for each in plans} == {stochastic}
    found = plan(recipe).noise
    assert found is not None
    assert (found.total, found.differing) == pytest.approx(naive(recipe, plans), rel=1e-5)
    assert (found.differing < 0.999 * found.total) == (tree.get("tree.splits") in ([4, 8],) or stochastic is None)


def test_drawn_splits_count_as_often_as_they_are_drawn() -> None:
    """Each step that can be drawn, once; not those that the first prompts happen to have."""
    recipe = load_recipe("quickstart+single")
    splits = make_schedule(recipe).splits
    assert isinstance(splits, DrawnSplits)
    plans = [Schedule(20, FixedSplits((step,), (16,)), "splits").plan(0, 0) for step in range(6, 16)]
    assert (splits.first, splits.last) == (6, 15)
    found = plan(recipe).noise
    assert found is not None
    assert (found.total, found.differing) == pytest.approx(naive(recipe, plans), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=9), st.randoms(use_true_random=False))
def test_noise_adds_up_in_squares(stds: list[float], random: Any) -> None:
    steps = len(stds)
    splits = tuple(sorted(random.sample(range(steps - 1), random.randint(1, steps - 1))))
    tree = Schedule(steps, FixedSplits(splits, (2,) * len(splits)), random.choice(["all", "splits"])).plan(0, 0)
    found = leaf_noise([tree, tree], torch.tensor(stds, dtype=torch.float64))
    on_path = [std if tree.stochastic[i] else 0.0 for i, std in enumerate(stds)]
    assert found.total == pytest.approx(math.hypot(*on_path), rel=1e-9, abs=1e-150)
    assert found.differing == pytest.approx(math.hypot(*on_path[splits[0] :]), rel=1e-9, abs=1e-150)
    assert found.differing <= found.total * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["dance", "flow", "cps"])
def test_the_stated_noise_level_injects_as_much(kind: str) -> None:
    eta = 0.1 if kind == "cps" else 0.7
    noise = planned_noise(load_recipe("quickstart+single", {"sampler.kind": kind, "sampler.eta": eta}))
    assert noise is not None
    wanted = 3 * noise.leaf.differing
    warning = noise.too_little("one", "'other'", wanted) or ""
    stated = float(re.findall(r"sampler\.eta=([\d.]+) in place of", warning)[0])
    again = planned_noise(load_recipe("quickstart+single", {"sampler.kind": kind, "sampler.eta": stated}))
    assert again is not None and again.leaf.differing == pytest.approx(wanted, rel=6e-3)  # three digits are shown
    assert noise.too_little("one", "'other'", noise.leaf.differing * 1.99) is None


def test_where_no_noise_level_injects_as_much_other_keys_are_named() -> None:
    noise = planned_noise(load_recipe("quickstart+single", {"sampler.kind": "cps", "sampler.eta": 0.5}))
    assert noise is not None
    assert "no sampler.eta injects as much; make more steps" in str(noise.too_little("a", "b", 10 * noise.leaf.total))


# What the commands say of it


def test_a_plan_states_the_noise_and_warns_of_a_method_with_little(run: Callable[..., tuple[str, str]]) -> None:
    dense, single = 0.8 * math.sqrt(1 - 1 / 12), 0.8 * math.sqrt(1 / 12)
    out, _ = run("plan", "unicycle")
    assert f"Noise injected into a leaf: {single:.3g} (the root of the sum of std^2" in out
    assert "Warning" not in out
    out, _ = run("plan", "quickstart+single")
    assert re.search(
        r"Warning: .* by a noise of 0\.146 under 'quickstart\+single', and of 0\.651 under 'quickstart'", out
    )
    assert "sampler.eta=3.12 in place of 0.7 injects as much" in out
    for words in (["quickstart+single", "sampler.eta=3.12"], ["quickstart+dancegrpo"], ["unicycle+branchgrpo"]):
        out, _ = run("plan", *words)
        assert "Noise injected into a leaf: " in out and "Warning" not in out
    assert f"Noise injected into a leaf: {dense:.3g} (" in out
    out, _ = run("plan", "unicycle", "tree.splits=[4]", "tree.branches=2")
    assert f"a leaf: {dense:.3g}, of which {0.8 * math.sqrt(7 / 12):.3g} from the first split on" in out
    out, _ = run("plan", "sudoku+dancegrpo")
    assert "Noise injected into a leaf: not known" in out and "Warning" not in out


def test_a_comparison_states_the_noise_and_warns_of_a_row_with_little(
    run: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    words = ["--iterations", "1", "--seeds", "0", *QUICK]
    methods = ["unicycle+branchgrpo@name=dense", "unicycle+dancegrpo@name=paths"]
    methods += ["unicycle@name=one", "unicycle@name=two,optim.lr=1e-4"]
    out, err = run("compare", *methods, *words, "--output", str(tmp_path / "warned"))
    assert "noise / leaf" in out
    saved = json.loads((tmp_path / "warned" / "compare.json").read_text())
    stated = {row["row"]: row["runs"][0]["work"]["leaf_noise"] for row in saved["results"]}
    dense, single = 0.8 * math.sqrt(11 / 12), 0.8 * math.sqrt(1 / 12)
    assert stated == pytest.approx({"dense": dense, "paths": dense, "one": single, "two": single}, rel=1e-5)
    assert err.count("a prompt's leaves differ") == 1
    assert "by a noise of 0.231 under 'one', 'two', and of 0.766 under the others (their median)" in err
    assert "sampler.eta=2.65 in place of 0.8 injects as much" in err
    equal = [methods[0], "unicycle@name=one,sampler.eta=2.65"]
    _, err = run("compare", *equal, *words, "--output", str(tmp_path / "silent"))
    assert "differ by a noise" not in err


# The spread of rewards within prompts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), min_size=1, max_size=6))
def test_the_ratio_is_the_naive_one(prompts: list[list[float]]) -> None:
    values = torch.tensor([value for each in prompts for value in each], dtype=torch.float64)
    group = torch.tensor([i for i, each in enumerate(prompts) for _ in each], dtype=torch.int64)
    found = spread_ratio(values, group, len(prompts))
    several = [each for each in prompts if len(each) > 1]
    across = statistics.stdev(map(statistics.fmean, several)) if len(several) > 1 else 0.0
    if across <= 2e-6 * max((abs(value) for each in prompts for value in each), default=0.0):
        assert math.isnan(found)
        return
    within = [statistics.stdev(each) for each in several]
    rounding = [2e-6 * max(map(abs, each)) for each in several]
    kept = [std if std > floor else 0.0 for std, floor in zip(within, rounding, strict=True)]
    assert found == pytest.approx(statistics.fmean(kept) / across, rel=1e-6)


@pytest.mark.parametrize("eta", [0.02, 0.8])
def test_a_run_whose_groups_hardly_differ_says_so_once(
    eta: float, run: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    """And one whose siblings differ says nothing."""
    words = ["run.iterations=14", f"sampler.eta={eta}", *QUICK, "--output", str(tmp_path / "run"), "--no-report"]
    _, err = run("train", "unicycle", *words)
    ratios = [row["reward/reach/spread_ratio"] for row in metrics(tmp_path / "run")]
    assert len(ratios) == 14 and (statistics.fmean(ratios) < LEAST_SPREAD) == (eta < 0.1)
    assert err.count("samples of one prompt differ by") == (eta < 0.1)
    if eta < 0.1:
        mean = statistics.fmean(ratios[:WATCHED])
        assert f"reward 'reach': over 10 iterations, samples of one prompt differ by {mean:.2g} of what prompts" in err
        assert "raise sampler.eta (it is 0.02; 'branchtree plan' states the noise of a leaf)" in err


def test_one_iteration_is_no_reason_and_neither_is_a_reward_that_is_only_observed() -> None:
    recipe = load_recipe("quickstart", {"sampler.transition": {"name": "own"}})
    watch = SpreadWatch(recipe, ["trained"])
    low, high, other = ({f"reward/{label}/spread_ratio": ratio} for label, ratio in
                        (("trained", 0.01), ("trained", 3.0), ("observed", 0.0)))  # fmt: skip
    assert [watch.warning(row) for row in [high, *[low] * 9, *[other] * 20, {}]] == [None] * 31
    said = [watch.warning(low) for _ in range(20)]
    assert said[1:] == [None] * 19 and "raise the noise of sampler.transition 'own'" in str(said[0])


def test_a_list_of_noise_levels_is_named_whole() -> None:
    watch = SpreadWatch(load_recipe("quickstart", {"tree.splits": [0, 3], "sampler.eta": [0.3, 0.25]}), ["trained"])
    warnings = [watch.warning({"reward/trained/spread_ratio": 0.01}) for _ in range(WATCHED)]
    assert "raise sampler.eta (it is 0.3, 0.25; " in str(warnings[-1])
