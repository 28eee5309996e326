"""Evaluating runs and base models end to end on a tiny FLUX: figures, files, grid, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decord import VideoReader
from guests import Outcome
from PIL import Image
from tiny_flux import tiny_flux
from training_runs import arguments, small

from branchtree import evaluate, train
from branchtree.core.scores import Scores
from branchtree.errors import BranchTreeError, RecipeError
from branchtree.pictures.grid import write_pictures
from branchtree.plugins import Media
from branchtree.studies.evaluate.figures import compare_scores
from branchtree.studies.evaluate.run import EvaluationResult
from branchtree.training.evaluation import Evaluated

PROMPTS = ("a two", "a six", "a nine")
SECTION = {"prompts": PROMPTS, "noises": 2, "rows": 4, "rewards": [{"reward": "digits", "classifier": "heldout"}]}
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "averaged": {"optim.ema": 0.5},
    "lora": {"lora.rank": 4, "run.precision": "bf16"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"), guidance_embeds=True)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A trained run of a kind, made once; it evaluates after each iteration, and shows what is evaluated."""
    folder, done = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = folder / kind
            changes = {"optim.lr": 0.01, "tree.noise_seed": 7, "run.sample_prompts": 3, **KINDS[kind]}
            section = {**SECTION, "every": 1}
            train("quickstart", {**small(model), "evaluation": section, **changes}, output=done[kind])
        return done[kind]

    return run


@pytest.fixture(scope="module")
def judged(runs: Callable[[str], Path]) -> Callable[[str], EvaluationResult]:
    """The judgement of a run of a kind as it is, made once."""
    return cache(lambda kind: evaluate(runs(kind)))


def logged(run: Path) -> dict[int, float]:
    """The reward's held-out mean by iteration, as the run recorded it."""
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["figures"]["digits"]["mean"] for row in rows}


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


# --- figures ---


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_the_run_logged(
    kind: str, runs: Callable[[str], Path], judged: Callable[[str], EvaluationResult]
) -> None:
    """Before training and after it; the averaged weights where the run keeps an average, as it exports them."""
    result, before_and_after = judged(kind).rewards["digits"], logged(runs(kind))
    assert result.base.mean == pytest.approx(before_and_after[0], abs=1e-6)
    assert result.trained is not None
    assert result.trained.mean == pytest.approx(before_and_after[2], abs=1e-6)
    assert result.difference == pytest.approx(before_and_after[2] - before_and_after[0], abs=1e-6)
    assert abs(before_and_after[2] - before_and_after[0]) > 1e-4


def test_an_earlier_checkpoint_can_be_judged(runs: Callable[[str], Path], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = evaluate(runs("whole"), checkpoint=1, output=tmp_path, advance=lambda *step: steps.append(step))
    assert steps == [(4, 12), (6, 12), (10, 12), (12, 12)]  # of both models, in batches of 4
    trained = result.rewards["digits"].trained
    assert result.iteration == 1 and trained is not None
    assert trained.mean == pytest.approx(logged(runs("whole"))[1], abs=1e-6)


def test_weights_of_no_average_can_be_judged(
    runs: Callable[[str], Path], judged: Callable[[str], EvaluationResult], tmp_path: Path
) -> None:
    plain = evaluate(runs("averaged"), {"optim.ema": None}, output=tmp_path / "plain").rewards["digits"].trained
    whole = judged("whole").rewards["digits"].trained
    assert plain == whole  # the average takes no part in what is learnt


@pytest.mark.parametrize("ema", [None, 0.9])
def test_base_against_base_differs_by_exactly_nothing(ema: float | None, model: Path, tmp_path: Path) -> None:
    """A run whose steps are too small to change a weight: the same weights read back, the same noises."""
    still = {"optim__lr": 1e-30, "optim__weight_decay": 0.0, "optim__ema": ema, "run__iterations": 1}
    train("quickstart", small(model, evaluation=SECTION, **still), output=tmp_path)
    result = evaluate(tmp_path)
    one = result.rewards["digits"]
    assert one.base == one.trained
    assert one.difference == 0.0 and one.interval is not None
    assert (one.interval.low, one.interval.high) == (0.0, 0.0)
    assert (one.improved, one.tied, one.counted, one.left_out) == (0.0, 1.0, 6, 0)
    base, trained = (
        [row["rewards"] for row in rows_of(result.output) if row["model"] == m] for m in ("base", "trained")
    )
    assert base == trained


def test_the_files_tell_the_same(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Figures worked out again from the samples, by their definitions."""
    rewards = ["digits classifier=heldout", "digits classifier=heldout measure=accuracy"]
    result = evaluate(runs("whole"), rewards=rewards, noises=3, limit=2, output=tmp_path)
    rows = rows_of(tmp_path)
    assert [(row["model"], row["prompt"], row["prompt_index"], row["noise"]) for row in rows] == [
        (m, PROMPTS[p], p, n) for m in ("base", "trained") for p in range(2) for n in range(3)
    ]
    record = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert record["iteration"] == 2 and record["settings"]["noises"] == 3
    assert list(record["figures"]) == rewards == list(record["settings"]["rewards"])
    for label, figure in record["figures"].items():
        values = np.array([row["rewards"][label]["value"] for row in rows])
        change = values[6:] - values[:6]
        assert figure["base"]["mean"] == pytest.approx(values[:6].mean())
        assert figure["trained"]["mean"] == pytest.approx(values[6:].mean())
        assert figure["difference"] == pytest.approx(change.mean())
        assert (figure["improved"], figure["tied"]) == ((change > 0).mean(), (change == 0).mean())
        assert figure["interval"]["low"] <= figure["difference"] <= figure["interval"]["high"]
        assert figure == asdict(result.rewards[label])


def scores(values: list[float], valid: list[bool]) -> Scores:
    return Scores(torch.tensor(values), torch.tensor(valid))


def test_samples_that_one_model_fails_on_leave_the_pair_out() -> None:
    nan = math.nan
    base = scores([1.0, 2.0, nan, 4.0, 5.0, 9.0], [True, True, False, True, True, True])
    trained = scores([3.0, 1.0, 7.0, nan, 5.0, nan], [True, True, True, False, True, False])
    one = compare_scores(base, trained, [0, 0, 0, 1, 1, 2], seed=1)
    assert (one.base.mean, one.base.valid, one.base.samples) == (21 / 5, 5, 6)
    assert one.trained is not None
    assert (one.trained.mean, one.trained.valid) == (16 / 4, 4)
    assert one.difference == pytest.approx((2 - 1 + 0) / 3)
    assert (one.improved, one.tied, one.counted, one.left_out, one.prompts) == (1 / 3, 1 / 3, 3, 3, 2)


def test_figures_that_cannot_be_known_are_none() -> None:
    nothing = compare_scores(scores([1.0, 2.0], [True, False]), scores([1.0, 2.0], [False, True]), [0, 1], seed=1)
    assert (nothing.difference, nothing.interval, nothing.improved, nothing.counted) == (None, None, None, 0)
    one_prompt = compare_scores(scores([1.0, 2.0], [True] * 2), scores([2.0, 2.0], [True] * 2), [0, 0], seed=1)
    assert (one_prompt.difference, one_prompt.interval) == (0.5, None)
    alone = compare_scores(scores([1.0, 3.0], [True] * 2), None, [0, 1], seed=1)
    assert (alone.trained, alone.difference, alone.improved) == (None, None, None)
    assert alone.interval is not None and alone.interval.low < 2.0 < alone.interval.high


def test_the_shares_of_processes_join_in_the_order_of_the_prompts() -> None:
    def share(pairs: list[tuple[int, int]]) -> Evaluated:
        values = torch.tensor([10.0 * prompt + noise for prompt, noise in pairs])
        reasons = {place: f"no {pair}" for place, pair in enumerate(pairs) if pair[1] == 1}
        media = {pair: Media(images=torch.zeros(1, 3, 1, 1)) for pair in pairs[:1]}
        given = Scores(values, values % 10 != 1, raw=-values, details={"twice": 2 * values}, reasons=reasons)
        return Evaluated(pairs, {"r": given}, media)

    whole = Evaluated.merge([share([(0, 0), (0, 1), (2, 0), (2, 1)]), share([(1, 0), (1, 1)])])
    assert whole.pairs == [(p, n) for p in range(3) for n in range(2)]
    joined, values = whole.scores["r"], [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]
    assert joined.raw is not None
    assert joined.values.tolist() == values and joined.raw.tolist() == [-value for value in values]
    assert joined.details["twice"].tolist() == [2 * value for value in values]
    assert joined.reasons == {1: "no (0, 1)", 3: "no (1, 1)", 5: "no (2, 1)"}
    assert set(whole.media) == {(0, 0), (1, 0)}


# --- pictures ---


def tiles(picture: Path, columns: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """A grid of square pictures, cut up again, row by row."""
    pixels = np.asarray(Image.open(picture)).astype(np.int64)
    side = pixels.shape[1] // columns
    return [
        pixels[top : top + side, left : left + side]
        for top in range(0, pixels.shape[0], side)
        for left in range(0, pixels.shape[1], side)
    ]


def test_the_grid_shows_the_same_noises_before_and_after(
    runs: Callable[[str], Path], judged: Callable[[str], EvaluationResult]
) -> None:
    """The run's own grids, of the first noise of each prompt, stand in two columns of ours."""
    run, output = runs("whole"), judged("whole").output
    index = json.loads((output / "grid.json").read_text())
    assert index["rows"] == list(PROMPTS)
    columns = [{"noise": n, "model": m} for n in range(2) for m in ("base", "trained")]
    assert index["columns"] == columns
    grid = tiles(output / "grid.png", 4)
    assert len(grid) == 3 * 4
    before, after = (tiles(run / "samples" / f"iteration_{n:06d}.png", 3) for n in (0, 2))
    for row in range(3):
        for shown, own in ((grid[4 * row], before[row]), (grid[4 * row + 1], after[row])):
            assert np.abs(shown - own).max() <= 1  # rounding: other samples were in the batch
        assert np.abs(grid[4 * row] - grid[4 * row + 2]).max() > 1


def test_videos_stand_side_by_side_too(tmp_path: Path) -> None:
    """Strips of frames, and the grid that plays: two samples a row."""
    shades = torch.arange(4).view(4, 1, 1, 1, 1) * 0.2 + torch.arange(3).view(1, 3, 1, 1, 1) * 0.05
    videos = shades.expand(4, 3, 3, 64, 64)
    layout = write_pictures(tmp_path / "grid", [Media(videos=videos, fps=8.0)], 2)
    assert layout["columns"] == 2 and layout["strip"] == [0, 1, 2]
    strips = np.asarray(Image.open(tmp_path / "grid.png"))
    assert strips.shape[:2] == (2 * 64 + 2, 6 * 64 + 5 * 2)
    seen = [[strips[32 + 66 * row, 32 + 66 * column, 0] / 255 for column in range(6)] for row in range(2)]
    expected = [[0.2 * (2 * row + side) + 0.05 * frame for side in range(2) for frame in range(3)] for row in range(2)]
    assert np.allclose(seen, expected, atol=0.003)
    assert VideoReader(str(tmp_path / "grid.mp4"))[0].shape[:2] == (128, 128)
    assert len(list((tmp_path / "grid").glob("sample_*.mp4"))) == 4


# --- the command ---


def test_the_command_prints_and_writes_next_to_the_run(
    runs: Callable[[str], Path], command: Callable[..., Outcome]
) -> None:
    done = command("evaluate", str(runs("whole")), "--noises", "2")
    assert done.code == 0, done.err
    assert "2 iterations against the base, 3 prompts x 2 noises" in done.out
    for name in ("Base", "Trained", "Difference", "95% interval", "Improved", "Tied", "Pairs"):
        assert name in done.out
    record = json.loads((runs("whole") / "evaluation/evaluation.json").read_text())["figures"]["digits"]
    ends = f"{record['interval']['low']:+.4f} to {record['interval']['high']:+.4f}"
    assert f"{record['difference']:+.4f}" in done.out and ends in done.out


def test_a_recipe_is_judged_alone_on_prompts_and_rewards_of_ones_own(
    model: Path, tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a recipe without an evaluation section; the files go to a folder named for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a four"}\n{"prompt": "an eight"}\n{"prompt": "a one"}\n')
    words = ["--reward", "digits label=mine", "--prompts", "mine.jsonl", "--noises", "2", "--limit", "2"]
    done = command("evaluate", "quickstart", *arguments(small(model)), *words)
    assert done.code == 0, done.err
    assert "the base model alone, 2 prompts x 2 noises" in done.out
    assert "Trained" not in done.out
    output = tmp_path / "runs/evaluation-quickstart"
    assert [(row["prompt"], row["noise"]) for row in rows_of(output)] == [
        ("a four", 0), ("a four", 1), ("an eight", 0), ("an eight", 1)
    ]  # fmt: skip
    figure = json.loads((output / "evaluation.json").read_text())["figures"]["mine"]
    assert figure["base"]["mean"] == pytest.approx(
        np.mean([row["rewards"]["mine"]["value"] for row in rows_of(output)])
    )
    assert figure["trained"] is None and figure["interval"]["low"] < figure["base"]["mean"] < figure["interval"]["high"]


def test_limits_of_a_recipe_do_not_cut_prompts_of_ones_own(model: Path, tmp_path: Path) -> None:
    recipe = small(model, evaluation={**SECTION, "limit": 1, "noises": 1})
    assert evaluate("quickstart", recipe, output=tmp_path / "a").prompts == 1
    assert evaluate("quickstart", recipe, prompts=["a two", "a six"], output=tmp_path / "b").prompts == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rewards": "digitz"}, "no reward 'digitz' is installed; did you mean 'digits'?"),
    ({"rewards": "motion_direction"}, "reward 'motion_direction' scores video, but the model makes images"),
    ({"prompts": "nowhere.txt"}, "no prompt file nowhere.txt"),
    ({"prompts": []}, "holds no prompts"),
    ({"noises": 0}, "noises: at least 1 is needed, not 0"),
    ({"checkpoint": 7}, "holds no checkpoint of iteration 7; it has 1, 2"),
    ({"smoke": True}, "is a run, which is judged with the model it trained; leave out --smoke"),
    ({"overrides": {"lora.rank": 2}}, "was trained under another 'lora' section"),
    ({"overrides": {"optim.ema": 0.9}}, "holds no averaged weights; leave out optim.ema"),
]


@pytest.mark.parametrize(("choices", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_judged_is_refused_before_the_model_is_loaded(
    choices: dict[str, Any], message: str, runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs("whole")
    monkeypatch.setattr("branchtree.studies.evaluate.run.load_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BranchTreeError) as refused:
        evaluate(run, **choices)
    assert message in str(refused.value)


def test_what_is_neither_run_nor_recipe_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_bytes((runs("whole") / "recipe.yaml").read_bytes())
    with pytest.raises(BranchTreeError, match="its folder cannot be made"):
        evaluate(runs("whole"), output=unfinished / "recipe.yaml" / "inside")
    for subject, message in (
        (tmp_path, "is no run's directory: it holds no recipe.yaml"),
        (tmp_path / "nowhere", "there is no run's directory"),
        ("quickstrt", "no recipe 'quickstrt'; did you mean 'quickstart'?"),
        (unfinished, "holds no checkpoint yet"),
    ):
        with pytest.raises(BranchTreeError) as refused:
            evaluate(subject)
        assert message in str(refused.value)


def test_a_recipe_without_what_is_needed_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no evaluation section; say which rewards and which prompts"):
        evaluate("quickstart", small(model), rewards="digits")
    with pytest.raises(RecipeError, match="a recipe has no checkpoints"):
        evaluate("quickstart", small(model), checkpoint=2)
    with pytest.raises(BranchTreeError, match="has no first frame; give it an 'image' or a 'video'"):
        evaluate("wan_quickstart", prompts=["a two"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
