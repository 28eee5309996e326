"""``branchtree compare``: rows, budgets, runs and their resumption, the table, the page; on a tiny FLUX."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fake_run import GRADIENT_ROWS, ROLLOUT_ROWS, build_run
from guests import Outcome, fake_distribution
from report_page import Page, assert_described, assert_self_contained, assert_well_formed
from scipy import stats
from tiny_flux import tiny_flux
from training_runs import arguments, largest_difference, metrics, small, weights

from branchtree import load_recipe
from branchtree.cli.app import app
from branchtree.cli.compare import parse_seeds, parse_words
from branchtree.core.student import student_quantile
from branchtree.errors import OutputError, RecipeError
from branchtree.report.read import read_run
from branchtree.studies.common.grids import parse_grid
from branchtree.studies.compare import Budget, ComparisonRequest, Row, run_comparison
from branchtree.studies.compare.page import curves, held_out_points, render_comparison, training_points
from branchtree.studies.compare.plan import iterations_within, plan_runs
from branchtree.studies.compare.request import multiply, parse_recipe
from branchtree.studies.compare.results import Comparison, paired_difference, seed_spread
from branchtree.studies.compare.table import figure, reward_sheet, work_sheet

JUDGED: dict[str, Any] = {
    "evaluation": {
        "prompts": ["a two", "a nine"],
        "rewards": [{"reward": "digits", "label": "log_prob", "classifier": "heldout"}],
        "noises": 2,
        "every": 1,
    },
    "optim.lr": 1e-3,
    "batch.prompts": 1,
    "run.sample_prompts": 1,
}
ROWS = (
    Row("tree", "quickstart"),
    Row("wide", "quickstart", {"tree.branches": 4, "tree.splits": [0], "tree.siblings": "independent"}),
)
SEEDS = (0, 3)
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"), guidance_embeds=True)


def shared(model: Path) -> dict[str, Any]:
    """What all rows change; how long they train is the comparison's to say."""
    return {key: value for key, value in {**small(model), **JUDGED}.items() if key != "run.iterations"}


def request(model: Path, **changes: Any) -> ComparisonRequest:
    given: dict[str, Any] = {"rows": ROWS, "seeds": SEEDS, "budget": Budget(iterations=2)}
    return ComparisonRequest(shared=shared(model), **{**given, **changes})


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, list[str]]:
    output, told = tmp_path_factory.mktemp("comparison"), list[str]()
    return run_comparison(request(model), output, tell=told.append), output, told


def copied(finished: tuple[Comparison, Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "copy"))


def held_out(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    return list({line["iteration"]: line["figures"]["log_prob"]["mean"] for line in lines}.values())


def times(output: Path) -> dict[str, int]:
    """When each finished run was written."""
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("summary.json")}


# What was asked


def test_words_are_recipes_or_overrides() -> None:
    words, shared = parse_words(["quickstart", "tree.steps=8", "a+b@tree.splits=[0,3],credit.beta=0", "x/own.yaml"])
    assert [parse_recipe(word) for word in words] == [
        Row("quickstart", "quickstart"),
        Row("a+b tree.splits=[0,3],credit.beta=0", "a+b", {"tree.splits": [0, 3], "credit.beta": 0}),
        Row("own", "x/own.yaml"),
    ]
    assert shared == {"tree.steps": 8}
    assert parse_recipe("quickstart@name=ten leaves,tree.branches=10") == Row(
        "ten leaves", "quickstart", {"tree.branches": 10}
    )


def test_grids_make_a_row_of_every_combination() -> None:
    grids = [parse_grid("tree.splits=[0,3,6,9],[0, 5],dense"), parse_grid("credit.path_scale=mean,sum")]
    rows = multiply([Row("one", "r", {"optim.lr": 1e-3}), Row("two", "r")], grids)
    assert len(rows) == 12
    assert rows[3] == Row(
        "one tree.splits=[0, 5] credit.path_scale=sum",
        "r",
        {"optim.lr": 1e-3, "tree.splits": [0, 5], "credit.path_scale": "sum"},
    )
    assert [row.overrides["tree.splits"] for row in rows[6::2]] == [[0, 3, 6, 9], [0, 5], "dense"]
    assert len({row.folder for row in rows}) == 12
    assert all(re.fullmatch(r"[\w.+=,@-]+", row.folder) for row in rows)
    ComparisonRequest(tuple(rows), (0,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_grid("tree.strength"), "write it as key=value,value"),
        (lambda: parse_grid("tree.strength=1,,2"), "write it as key=value,value"),
        (lambda: parse_recipe("quickstart@dense"), "after @ write key=value"),
        (lambda: parse_seeds("0,one"), "whole numbers"),
        (lambda: ComparisonRequest((Row("a", "quickstart"),), (1, 1)), "seed '1' comes twice"),
        (
            lambda: ComparisonRequest((Row("a", "x"), Row("a", "y")), (1,)),
            "row 'a' comes twice; name one with RECIPE@name",
        ),
        (lambda: ComparisonRequest((Row("a b", "x"), Row("a_b", "y")), (1,)), "folder 'a_b' comes twice"),
        (lambda: ComparisonRequest((Row("a", "x"),), (-1,)), "0 or above, not -1"),
        (lambda: ComparisonRequest((Row("a", "x", {"seed": 3}),), (1,)), "seed: the comparison sets it.*--seeds"),
        (lambda: ComparisonRequest((Row("a", "x"),), (1,), shared={"run.iterations": 3}), "use --iterations or --rows"),
        (lambda: ComparisonRequest((), (1,)), "at least one recipe"),
        (lambda: Budget(3, 3), "give one of the two"),
    ],
)
def test_a_wrong_request_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_rows_with_other_prompts_or_another_evaluation_are_refused(model: Path, tmp_path: Path) -> None:
    judged = copy.deepcopy(JUDGED)
    odd = Row("odd", "quickstart", {"data.prompts": ["a one"], "evaluation.noises": 3, "evaluation.every": 5})
    with pytest.raises(RecipeError, match=r"'tree' and 'odd' differ in data.prompts, evaluation.noises:"):
        plan_runs(request(model, rows=(ROWS[0], odd)), tmp_path)
    with pytest.raises(RecipeError, match=r"row 'bad': override tree.strenth=3: tree.strenth: unknown key"):
        plan_runs(request(model, rows=(ROWS[0], Row("bad", "quickstart", {"tree.strenth": 3}))), tmp_path)
    assert judged == JUDGED  # a row's own keys inside a section that all rows change stay its own


def documented() -> list[list[str]]:
    page = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text(encoding="utf-8")
    return [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("branchtree compare")]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_name_rows_that_can_be_planned(words: list[str], tmp_path: Path) -> None:
    given = COMMANDS["compare"].make_context("compare", words).params
    words, changes = parse_words(given["recipes"])
    multiplied = multiply([parse_recipe(word) for word in words], [parse_grid(text) for text in given["grid"] or []])
    budget = Budget(iterations=4)
    plans = plan_runs(ComparisonRequest(tuple(multiplied), parse_seeds(given["seeds"])[:1], budget, changes), tmp_path)
    assert len({run.recipe.model_dump_json(exclude={"name", "description"}) for run in plans.runs}) == len(multiplied)
    assert len(multiplied) > 1


# Budgets


def test_equal_optimiser_steps_are_shared_out_over_iterations(model: Path, tmp_path: Path) -> None:
    rows = tuple(Row(f"{n}", "quickstart", {"optim.steps_per_iteration": n}) for n in (2, 1, 4))
    plans = plan_runs(request(model, rows=rows, budget=Budget(iterations=6)), tmp_path)
    assert [run.recipe.run.iterations for run in plans.runs[:3]] == [6, 12, 3]
    assert [(run.row, run.seed) for run in plans.runs] == [("2", 0), ("1", 0), ("4", 0), ("2", 3), ("1", 3), ("4", 3)]
    assert all(run.recipe.seed == run.recipe.tree.noise_seed == run.seed for run in plans.runs)
    with pytest.raises(RecipeError, match="10 optimiser steps are no whole number of iterations of '4'"):
        plan_runs(request(model, rows=rows, budget=Budget(iterations=5)), tmp_path)
    assert plan_runs(request(model, rows=rows[:1], budget=Budget()), tmp_path).budget == {
        "optimiser_steps": 2 * load_recipe("quickstart").run.iterations
    }


def test_rows_spent_stay_within_an_equal_budget(model: Path, tmp_path: Path) -> None:
    """Each run spends the budget but for less than one more iteration; one that cannot afford an iteration has one."""
    budget = 150
    single = Row("single", "quickstart", {"tree.splits": "single", "tree.branches": 4})
    unjudged = {**shared(model), "evaluation": None}
    asked = ComparisonRequest((ROWS[0], single), (0,), Budget(rows=budget), unjudged)
    for row in run_comparison(asked, tmp_path).rows:
        spent = [line["rows/equivalent"] for line in metrics(tmp_path / row.name / "seed_0")]
        assert len(spent) > 1
        assert sum(spent) <= budget < sum(spent) + max(spent)
        assert row.finished[0].row_equivalents == sum(spent)
    recipe = load_recipe("quickstart", unjudged)
    assert iterations_within(recipe, 1) == 1
    each = metrics(tmp_path / "tree/seed_0")[0]["rows/equivalent"]
    assert [iterations_within(recipe, int(rows)) for rows in (3 * each - 1, 3 * each)] == [2, 3]


# The table


def test_the_table_says_what_the_files_say(finished: tuple[Comparison, Path, list[str]]) -> None:
    comparison, output, told = finished
    work, rewards = work_sheet(comparison), reward_sheet(comparison)
    assert len(told) == 4 and "tree, seed 0: 2 iterations in" in told[0]
    for place, name in enumerate(("tree", "wide")):
        runs = [output / name / f"seed_{seed}" for seed in SEEDS]
        rows = [line for run in runs for line in metrics(run)]
        leaves = 4
        cells = dict(zip(work.heads, work.rows[place], strict=True))
        assert cells["row"] == name and cells["runs"] == "2" and cells["iter."] == "2"
        for head, key in (("rollout rows", "rows/rollout"), ("gradient rows", "rows/gradient"),
                          ("trained edges", "edges/trained"), ("leaves", "leaves/scored")):  # fmt: skip
            assert float(cells[head]) == statistics.fmean(row[key] for row in rows)
        # Every node but the leaves goes through the denoiser once.
        assert float(cells["nodes / leaf"]) == (rows[0]["rows/rollout"] + leaves) / leaves
        taken = [json.loads(line) for run in runs for line in (run / "timing.jsonl").read_text().splitlines()]
        assert float(cells["s / iter."]) == pytest.approx(statistics.fmean(row["total"] for row in taken), rel=1e-3)
        used = [json.loads(line)["seconds"] for run in runs for line in (run / "cpu.jsonl").read_text().splitlines()]
        assert len(used) == 6 and float(cells["CPU s"]) == pytest.approx(sum(used) / 2, rel=1e-3)
        curves = [held_out(run) for run in runs]
        before, after, difference = rewards.rows[place][1:]
        for cell, values in ((before, [c[0] for c in curves]), (after, [c[-1] for c in curves])):
            shown = [float(part) for part in cell.split(" +- ")]
            expected = [statistics.fmean(values), abs(values[0] - values[1]) / math.sqrt(2)]
            assert shown == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert (difference == "-") == (place == 0)
    finals = [[held_out(output / name / f"seed_{seed}")[-1] for seed in SEEDS] for name in ("wide", "tree")]
    interval = stats.ttest_rel(*finals).confidence_interval(0.95)
    shown = [float(number) for number in re.findall(r"[-+][\d.e-]+", rewards.rows[1][3])]
    mean = statistics.fmean(a - b for a, b in zip(*finals, strict=True))
    assert shown == pytest.approx([mean, interval.low, interval.high], rel=2e-3)


def test_markdown_and_json_hold_the_same_table(finished: tuple[Comparison, Path, list[str]]) -> None:
    comparison, output, _ = finished
    lines = [line for line in (output / "compare.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    work, rewards = work_sheet(comparison), reward_sheet(comparison)
    assert cells[0] == [*work.heads, *rewards.heads[1:]]
    assert cells[2:] == [[*one, *other[1:]] for one, other in zip(work.rows, rewards.rows, strict=True)]
    saved = json.loads((output / "compare.json").read_text())
    assert saved["asked"]["budget"] == {"optimiser_steps": 2} and saved["asked"]["seeds"] == list(SEEDS)
    tree = saved["results"][0]
    assert [run["after"]["log_prob"] for run in tree["runs"]] == [
        held_out(output / f"tree/seed_{s}")[-1] for s in SEEDS
    ]
    assert tree["held_out"]["log_prob"]["difference_to_first"]["mean"] == 0.0


def test_both_seeds_matter_and_both_rows_start_alike(finished: tuple[Comparison, Path, list[str]]) -> None:
    output = finished[1]
    ends = {(name, seed): held_out(output / name / f"seed_{seed}") for name in ("tree", "wide") for seed in SEEDS}
    assert len({values[0] for values in ends.values()}) == 1
    assert len({values[-1] for values in ends.values()}) == 4


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 101])
def test_quantiles_of_t_are_scipys(freedom: int) -> None:
    for probability in (0.5, 0.8, 0.975, 0.9999):
        assert student_quantile(probability, freedom) == pytest.approx(
            stats.t.ppf(probability, freedom), rel=1e-10, abs=1e-12
        )
    with pytest.raises(ValueError, match="no quantile"):
        student_quantile(0.3, freedom)


def test_one_seed_has_no_spread_and_seeds_are_paired() -> None:
    assert seed_spread([]) is None
    alone = seed_spread([2.0])
    assert alone is not None and alone.std is None
    pair = paired_difference({1: 5.0, 2: 7.0, 9: 100.0}, {2: 6.0, 1: 1.0, 4: 0.0})
    assert pair is not None and pair.pairs == 2 and pair.mean == 2.5  # (5 - 1 + 7 - 6) / 2
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


# Going on


def test_finished_runs_are_left_alone_and_rows_and_seeds_are_added(
    model: Path, finished: tuple[Comparison, Path, list[str]], tmp_path: Path
) -> None:
    output, told = copied(finished, tmp_path), list[str]()
    before = times(output)
    more = Row("more", "quickstart", {"credit.beta": 0.0})
    comparison = run_comparison(request(model, rows=(*ROWS, more), seeds=SEEDS), output, tell=told.append)
    after = times(output)
    assert before.items() <= after.items() and after.keys() - before.keys() == {
        f"more/seed_{seed}/summary.json" for seed in SEEDS
    }
    assert told[0] == "4 of 6 runs were finished before" and len(told) == 3
    assert [row.name for row in comparison.rows] == ["tree", "wide", "more"] and comparison.complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget(iterations=3)}, "the budget was 2 optimiser steps and is 3 optimiser steps"),
        ({"budget": Budget(rows=500)}, "the budget was 2 optimiser steps and is 500 rows"),
        ({"seeds": (0,)}, "seed 3 is missing"),
        ({"rows": ROWS[:1]}, "row 'wide' is missing"),
        ({"rows": (ROWS[0], Row("wide", "quickstart", {"tree.branches": 3}))},
         "row 'wide' changed in tree.splits, tree.branches, tree.siblings"),
    ],
)  # fmt: skip
def test_another_request_is_refused(
    model: Path, finished: tuple[Comparison, Path, list[str]], changes: dict[str, Any], message: str
) -> None:
    before = (finished[1] / "compare.json").read_bytes()
    with pytest.raises(OutputError, match=message):
        run_comparison(request(model, **changes), finished[1])
    assert (finished[1] / "compare.json").read_bytes() == before


def test_a_run_that_was_killed_goes_on_to_the_same_end(
    model: Path, finished: tuple[Comparison, Path, list[str]], tmp_path: Path
) -> None:
    """Kill one run after its first iteration and its checkpoint, and another before any."""
    output = copied(finished, tmp_path)
    before = times(output)
    half, barely = output / "wide/seed_3", output / "tree/seed_0"
    for run in (half, barely):
        (run / "summary.json").unlink()
        shutil.rmtree(run / "final")
    shutil.rmtree(half / "checkpoints/iteration_000002")
    shutil.rmtree(barely / "checkpoints")
    first = (half / "cpu.jsonl").read_text().splitlines()[0]
    assert run_comparison(request(model), output).complete
    assert {name for name, when in times(output).items() if before[name] != when} == {
        "wide/seed_3/summary.json",
        "tree/seed_0/summary.json",
    }
    for run in (half, barely):
        whole = finished[1] / run.relative_to(output)
        assert [row["iteration"] for row in metrics(run)] == [0, 1]
        assert held_out(run) == held_out(whole)
        assert largest_difference(weights(run), weights(whole)) == 0.0
    # Processor time is kept for what was done before, and counted once for what was done twice.
    lines = (half / "cpu.jsonl").read_text().splitlines()
    assert lines[0] == first and [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]


def test_a_finished_run_of_another_length_is_refused(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "tree/seed_0"
    run.mkdir(parents=True)
    (run / "summary.json").write_text('{"iterations": 7}')
    with pytest.raises(OutputError, match="holds a run of 7 iterations, not of 2"):
        run_comparison(request(model), tmp_path)


FATAL = """
import os
from pydantic import BaseModel
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins import Callback


class Nothing(BaseModel):
    pass


class Fatal(Callback):
    def __init__(self, config):
        pass

    def on_start(self, output, iteration, iterations):
        os._exit(9)  # as the kernel ends a process for want of memory


@hookimpl
def register_callbacks(register):
    register("fatal", build=Fatal, config=Nothing, summary="Ends the process.")
"""


def test_a_process_gives_what_this_one_gives_and_one_that_dies_takes_only_its_run(
    guest_site: Path, plug: Callable[[Path], None], tmp_path: Path
) -> None:
    plug(guest_site)
    plug(fake_distribution(tmp_path / "site", "fatal", {"fatal": "fatal_callback"}, {"fatal_callback": FATAL}))
    dies, lives = Row("dies", "guest", {"callbacks": [{"callback": "fatal"}]}), Row("lives", "guest")
    several = run_comparison(ComparisonRequest((dies, lives), (5,), Budget(iterations=3)), tmp_path / "several", jobs=2)
    alone = run_comparison(ComparisonRequest((lives,), (5,), Budget(iterations=3)), tmp_path / "alone")
    assert [run.status for row in several.rows for run in row.runs] == ["failed", "finished"]
    assert "its process was killed" in several.rows[0].runs[0].message
    run, same = several.rows[1].runs[0], alone.rows[0].runs[0]
    assert (run.after, run.work) == (same.after, same.work)
    assert run.after != run.before and run.cpu_seconds


# Failure


def test_a_failing_row_is_told_of_and_the_others_go_on(
    model: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    """The model of one row is missing; the command ends with 1, and all else is there."""
    words = [*arguments(shared(model)), "--seeds", "0", "--iterations", "1", "--output", str(tmp_path)]
    outcome = command("compare", "quickstart@name=lost,model.path=nowhere/at/all", "quickstart@name=fine", *words)
    assert outcome.code == 1
    assert "[1/2] lost, seed 0: failed:" in outcome.out and "[2/2] fine, seed 0: 1 iterations in" in outcome.out
    assert re.search(r"^lost +0 of 1, 1 failed +- ", outcome.out, re.MULTILINE)
    assert "Not finished: lost, seed 0: failed: " in outcome.out and "nowhere/at/all" in outcome.out
    runs = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert runs[0]["runs"][0]["status"] == "failed" and "nowhere/at/all" in runs[0]["runs"][0]["message"]
    assert runs[1]["runs"][0]["after"]["log_prob"] == held_out(tmp_path / "fine/seed_0")[-1]
    assert "- lost, seed 0: failed: " in (tmp_path / "compare.md").read_text()
    shown = Page((tmp_path / "compare.html").read_text())
    assert "not finished: 1 of 2 runs" in shown.text and "lost, seed 0: failed" in shown.text


def test_a_wrong_request_ends_the_command_with_2(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("compare", "quickstart", "--grid", "tree.strength", "--output", str(tmp_path))
    assert outcome.code == 2 and "error: grid 'tree.strength'" in outcome.err
    assert list(tmp_path.iterdir()) == []


# The page


def test_the_page_has_every_curve_and_needs_nothing_else(finished: tuple[Comparison, Path, list[str]]) -> None:
    shown = Page((finished[1] / "compare.html").read_text(encoding="utf-8"))
    assert_self_contained(shown)
    assert_well_formed(shown)
    assert_described(shown)
    assert shown.count("svg", "plot") == 6  # a held-out figure and a training reward, against three things
    output = finished[1]
    for axis in ("iteration", "rows", "time"):
        told = next(
            label for label in shown.values("aria-label") if label.startswith(f"Held-out log_prob against {axis}")
        )
        for name in ("tree", "wide"):
            ends = [statistics.fmean(held_out(output / name / f"seed_{s}")[at] for s in SEEDS) for at in (0, -1)]
            first, last = (f"{end:#.4g}".replace("-", "\u2212") for end in ends)
            assert f"{name} from {first} to {last}" in told
    assert {"pick-iteration", "pick-rows", "pick-time"} <= set(shown.values("class"))


def test_points_lie_where_rows_and_time_were_spent(finished: tuple[Comparison, Path, list[str]]) -> None:
    comparison, output, _ = finished
    curve = curves(comparison, lambda run: held_out_points(run, "log_prob"))[1]
    assert curve is not None
    runs = [output / "wide" / f"seed_{seed}" for seed in SEEDS]
    rows = [[line["rows/equivalent"] for line in metrics(run)] for run in runs]
    seconds = [[json.loads(line)["total"] for line in (r / "timing.jsonl").read_text().splitlines()] for r in runs]
    assert curve.x["iteration"] == [0, 1, 2]
    for axis, spent in (("rows", rows), ("time", seconds)):
        expected = [statistics.fmean(sum(run[:done]) for run in spent) for done in range(3)]
        assert curve.x[axis] == pytest.approx(expected)
    figures = torch.tensor([held_out(run) for run in runs], dtype=torch.float64)
    assert curve.mean == pytest.approx(figures.mean(0).tolist())
    assert curve.std == pytest.approx(figures.std(0).tolist(), abs=1e-12)


def test_long_runs_are_smoothed(tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path, iterations=60))
    rewards = [row["reward/digits/mean"] for row in metrics(tmp_path)]
    points = training_points(run, "digits")
    assert [point.iteration for point in points] == list(range(1, 61))
    assert points[29].y == pytest.approx(statistics.fmean(rewards[28:31]))
    assert points[29].rows == 30 * (ROLLOUT_ROWS + 3 * GRADIENT_ROWS)


def test_names_are_escaped(finished: tuple[Comparison, Path, list[str]]) -> None:
    text = render_comparison(finished[0], "<script>x</script>", "a & b")
    assert "<script>" not in text and "a &amp; b" in text
    assert [figure(value) for value in (3.0, 0.123456, -12345.678, 2e-5)] == ["3", "0.1235", "-1.235e+04", "2e-05"]
