"""The functions behind ``import branchtree``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchtree.errors import OutputError
from branchtree.files.names import folder_name
from branchtree.files.reading import require_name, user_path
from branchtree.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from branchtree.planning.plan import RunPlan
    from branchtree.plugins.base import Callback
    from branchtree.studies.compare import Comparison
    from branchtree.studies.diversity.study import Study
    from branchtree.studies.evaluate import EvaluationResult
    from branchtree.studies.score import ScoredFile
    from branchtree.training.reporter import TrainResult


def train(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    smoke: bool = False,
    resume: bool = False,
    allow: Sequence[str] = (),
    checkpoint: int | None = None,
    start: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    force: bool = False,
) -> TrainResult:
    """Train a model by a recipe.

    ``recipe`` is a name, a YAML path, or a loaded Recipe; ``overrides`` maps dotted keys to values, as in
    ``{"optim.lr": 2e-5}``. The run is written to ``output``, by default ``runs/<recipe name>``; ``resume`` continues
    the one that is there, under the same recipe but for keys that do not touch what is learnt and those that ``allow``
    names, as in ``("optim.lr", "rewards.0.url")``; it goes on from the newest checkpoint, or from that of
    ``checkpoint`` iterations. ``start`` begins a new run with the weights of a run, a checkpoint, or a LoRA's file or
    folder. ``smoke`` swaps in the recipe's small models and rewards. On a GPU whose free memory is less than the plan's
    estimate nothing is downloaded or loaded, unless ``force`` is true. Raises a BranchTreeError, with what is wrong and
    where, before work is done that it would cost.
    """
    from branchtree.run.directory import RunDirectory
    from branchtree.training.start import with_start
    from branchtree.training.trainer import train_recipe

    resolved = _resolve(recipe, overrides, smoke)
    root = user_path(output or Path("runs") / folder_name(resolved.name))
    require_name(root, OutputError)
    begun = with_start(resolved, None if start is None else Path(start), RunDirectory(root) if resume else None)
    return train_recipe(begun, root, resume, callbacks, allow, checkpoint, force)


def plan(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None, *, smoke: bool = False) -> RunPlan:
    """Work out a recipe's tree, rows and memory without loading a model; see ``train`` for the arguments."""
    from branchtree.planning.plan import plan_recipe

    return plan_recipe(_resolve(recipe, overrides, smoke))


def evaluate(
    run_or_recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    rewards: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    noises: int | None = None,
    limit: int | None = None,
    checkpoint: int | None = None,
    lora: str | Path | None = None,
    output: str | Path | None = None,
    smoke: bool = False,
    force: bool = False,
) -> EvaluationResult:
    """Judge a run's model, or a LoRA, against its base on held-out prompts, or a recipe's base model alone.

    ``run_or_recipe`` is a run's directory, whose newest checkpoint is taken, or that of ``checkpoint`` iterations; or
    a recipe as ``train`` takes it. Both models make samples of the same prompts from the same noises, without further
    noise, and each reward's difference comes with an interval over prompts. ``rewards``, named as ``score`` names
    them, ``prompts`` (a file, or texts), ``noises`` per prompt and ``limit``, of prompts, stand in for what the
    recipe's ``evaluation`` section says. ``lora`` is a LoRA's file or folder, of any common kind, or a run that trained
    one: it is judged in place of the run's own weights. Figures, every sample's scores and pictures are written to
    ``output``, by default ``evaluation`` in the run's directory, or ``runs/evaluation-<recipe name>``. ``force`` is as
    in ``train``.
    Raises a BranchTreeError, with what is wrong and where, before anything is loaded if it can be known then.
    """
    from branchtree.studies.evaluate import evaluate_subject
    from branchtree.studies.evaluate.request import EvaluationChoices

    written = None if output is None else user_path(output)
    choices = EvaluationChoices(rewards, prompts, noises, limit, written, force, lora)
    return evaluate_subject(run_or_recipe, overrides, choices, smoke=smoke, checkpoint=checkpoint)


def score(
    files: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    rewards: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    prompt: str | None = None,
    device: str = "auto",
    batch: int = 8,
) -> list[ScoredFile]:
    """Score pictures and videos that lie in files, in the order given.

    ``files`` are images, videos, folders of them, ``.jsonl`` lists, or rows as the lists hold them:
    ``{"image": path, "prompt": text}``, or ``"video"``; other keys are kept as metadata. ``rewards`` are names,
    ``"hps version=v2.0"``, or mappings as in a recipe's ``rewards``. ``prompt`` is for files that bring none. ``batch``
    samples of one size are scored at a time, fewer if they are large. Raises a BranchTreeError, with file and line,
    before anything is loaded if an input cannot be read or is of a kind that a reward does not score.
    """
    from branchtree.studies.score import score_files

    return score_files(files, rewards, prompt=prompt, device=device, batch=batch)


def compare(
    recipes: str | Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    iterations: int | None = None,
    rows: int | None = None,
    grid: Sequence[str] = (),
    jobs: int = 1,
    output: str | Path = "runs/compare",
    smoke: bool = False,
    title: str = "",
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train several recipes under the same seeds, prompts and budget, and put them into one table and one page.

    ``recipes`` are names or paths, each with changes of its own as in ``"quickstart@tree.branches=4"``; ``overrides``
    change all of them, and a ``grid`` word such as ``"tree.strength=1,2,4"`` makes a row of every recipe and value. The
    budget is ``iterations`` of the first row, or ``rows`` through the denoiser for every run. Runs are written below
    ``output``, ``jobs`` at a time; those that are there and finished are left alone, so that the same call goes on
    after an interruption. ``tell`` gets a line for every run. Raises a BranchTreeError if a recipe is wrong or
    ``output`` holds another comparison; a run that fails is named in the result.
    """
    from branchtree.studies.common.grids import parse_grid
    from branchtree.studies.compare.compare import run_comparison
    from branchtree.studies.compare.request import Budget, ComparisonRequest, multiply, parse_recipe

    words = [recipes] if isinstance(recipes, str) else recipes
    request = ComparisonRequest(
        rows=tuple(multiply([parse_recipe(word) for word in words], [parse_grid(text) for text in grid])),
        seeds=tuple(seeds),
        budget=Budget(iterations, rows),
        shared=dict(overrides or {}),
        smoke=smoke,
        title=title,
    )
    return run_comparison(request, user_path(output), jobs, tell)


def diversity(
    run_or_recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    samples: int = 4096,
    features: str | Sequence[str] = "pixels",
    prompts: str | Path | None = None,
    grid: Sequence[str] = (),
    shared_noise: bool = True,
    seed: int | None = None,
    output: str | Path | None = None,
    smoke: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Study:
    """Compare branched with plain rollouts of one model: KID, MMD^2, and distances within prompts.

    ``run_or_recipe`` is as in ``evaluate``. ``samples`` of each set are rounded up to whole trees; ``features`` are
    feature spaces by name, with settings as in ``"clip normalize=true"``. ``grid`` words such as
    ``"tree.strength=1,2,4"`` are ways to branch, tried in all combinations. With ``shared_noise`` plain samples come in
    groups that start from one initial noise, too. ``seed`` addresses all noise, the recipe's by default. Figures are
    written to ``output``, by default ``diversity`` in the run's directory or ``runs/diversity-<recipe name>``.
    ``advance`` is called with the number of samples made and wanted. Raises a BranchTreeError before anything is loaded
    if what is wrong can be known then.
    """
    from functools import partial

    from branchtree.studies.diversity.files import write_study
    from branchtree.studies.diversity.request import DiversityChoices, make_diversity_request
    from branchtree.studies.diversity.study import run_study
    from branchtree.studies.evaluate.subject import find_subject

    spaces = (features,) if isinstance(features, str) else tuple(features)
    source, folder = (None if path is None else Path(path) for path in (prompts, output))
    choices = DiversityChoices(samples, spaces, source, grid, folder, seed, shared_noise)
    find = partial(find_subject, run_or_recipe, smoke=smoke, iteration=None)
    study = run_study(make_diversity_request(find, dict(overrides or {}), choices), advance)
    write_study(study)
    return study


def write_report(run: str | Path) -> Path:
    """Write a run's report.html from its files, and return its path. Raises OutputError if there is no run."""
    from branchtree.report import write_page

    return write_page(user_path(run))


def _resolve(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None, smoke: bool) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides or smoke:
            raise TypeError("a loaded recipe takes neither overrides nor smoke: give them to load_recipe")
        return recipe
    return load_recipe(recipe, overrides, smoke=smoke)
