"""The functions of ``import branchtree``. Heavy modules are imported inside them, so that the import is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchtree.errors import OutputError
from branchtree.files.names import default_output
from branchtree.files.reading import require_name, user_path
from branchtree.recipe import Recipe
from branchtree.recipe.load import load_base, resolve_recipe

if TYPE_CHECKING:
    from branchtree.exporting import Format
    from branchtree.exporting.lora import Exported
    from branchtree.migration.converted import ConvertedConfig
    from branchtree.planning.plan import RunPlan
    from branchtree.plugins.base import Callback
    from branchtree.studies.compare import Comparison
    from branchtree.studies.diversity import Study
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

    Args:
        recipe: A recipe's name, the path of a YAML file, or a loaded Recipe.
        overrides: Values by dotted key, as in ``{"optim.lr": 2e-5}``.
        output: The run's directory; ``runs/<recipe name>`` by default.
        smoke: Whether to use the recipe's small model and rewards.
        resume: Whether to continue the run in ``output``, from its newest checkpoint. The recipe must be the same, but
            for keys that do not affect learning and those that ``allow`` names.
        allow: Keys that may have changed since, as in ``("optim.lr", "rewards.0.url")``.
        checkpoint: With ``resume``, the number of iterations of the checkpoint to continue from instead.
        start: Weights to begin a new run with: a run, a checkpoint, or a LoRA's file or folder.
        callbacks: Called during training, besides those of the recipe.
        force: Whether to start even on a GPU whose free memory is less than the plan's estimate. Otherwise nothing is
            downloaded or loaded there.

    Raises:
        BranchTreeError: Something is wrong; the message says what and where. It is raised as early as it can be known.
    """
    from branchtree.run.directory import RunDirectory
    from branchtree.run.start import with_start
    from branchtree.training.trainer import train_recipe

    resolved = resolve_recipe(recipe, overrides, smoke)
    root = user_path(output or default_output(resolved.name))
    require_name(root, OutputError)
    begun = with_start(resolved, None if start is None else Path(start), RunDirectory(root) if resume else None)
    result = train_recipe(begun, root, resume, callbacks, allow, checkpoint, force)
    if result.finished and result.main_process:
        from branchtree.exporting.card import write_card

        write_card(root)
    return result


def plan(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None, *, smoke: bool = False) -> RunPlan:
    """Compute a recipe's tree, rows and memory without loading a model; the arguments are those of ``train``."""
    from branchtree.planning.plan import plan_recipe

    return plan_recipe(resolve_recipe(recipe, overrides, smoke), load_base(recipe, overrides, smoke))


def register(plugin: object, name: str = "this process") -> None:
    """Register a plug-in that is not installed, such as a notebook's own, for as long as the process lives.

    Args:
        plugin: A module or object with functions marked by ``branchtree.plugins.hookimpl``; ``sys.modules[__name__]``
            is one's own module.
        name: Whose plug-in it is. What was registered under the same name before is replaced.

    Raises:
        PluginError: A name is taken by another plug-in, or a hook is misspelt.
    """
    from branchtree.plugins.registry import register_here

    register_here(plugin, name)


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
    advance: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Judge a run's model, or a LoRA, against its base on held-out prompts, or a recipe's base model alone.

    Both models make samples of the same prompts from the same noises, without further noise, and each reward's
    difference has a confidence interval over prompts.

    Args:
        run_or_recipe: A run's directory, or a recipe as for ``train``.
        overrides: Values by dotted key of the recipe.
        rewards: The rewards that judge, as for ``score``; by default those of the recipe's ``evaluation`` section, as
            for the next three arguments.
        prompts: A file of prompts, or the prompts themselves.
        noises: Samples per prompt.
        limit: The most prompts that are used.
        checkpoint: The number of iterations of the checkpoint to judge; the newest one by default.
        lora: A LoRA to judge instead of the run's own weights: a file or folder of any common kind, or a run that
            trained one.
        output: The folder for figures, every sample's scores, and pictures; by default ``evaluation`` in the run's
            directory, or ``runs/evaluation-<recipe name>``.
        smoke: Whether to use the recipe's small model and rewards.
        force: As for ``train``.
        advance: Called with the number of samples that this process has made, and that all will make.

    Raises:
        BranchTreeError: Something is wrong; the message says what and where. It is raised before anything is loaded if
            it can be known then.
    """
    from branchtree.studies.common.subject import find_subject
    from branchtree.studies.evaluate import EvaluationChoices, evaluate_subject

    subject = find_subject(run_or_recipe, overrides, smoke, checkpoint, lora)
    written = None if output is None else user_path(output)
    return evaluate_subject(subject, EvaluationChoices(rewards, prompts, noises, limit, written, force), advance)


def score(
    files: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    rewards: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    prompt: str | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    batch: int = 8,
    advance: Callable[[int, int], None] | None = None,
) -> list[ScoredFile]:
    """Score files of pictures, videos and samples of other kinds, and return the scores in the order of the files.

    Args:
        files: Images, videos, folders of them, ``.safetensors`` files of samples as a run keeps them, ``.jsonl`` lists,
            or rows as in such a list: ``{"image": path, "prompt": text}``, or with ``"video"`` or ``"samples"``; other
            keys are kept as metadata.
        rewards: Names with settings, as in ``"hps version=v2.0"``, or mappings as in a recipe's ``rewards``.
        prompt: The prompt of files that have none of their own.
        output: A file for the scores as JSON lines; it is replaced if it exists.
        device: ``auto``, ``cpu`` or ``cuda``.
        batch: Samples of one size that are scored at a time; fewer if they are large.
        advance: Called with the number of scores made and wanted.

    Raises:
        BranchTreeError: An input cannot be read, or is of a kind that a reward does not score. The message has file and
            line, and is raised before anything is loaded.
    """
    from branchtree.studies.score import score_files

    written = None if output is None else user_path(output)
    return score_files(files, rewards, prompt=prompt, device=device, batch=batch, output=written, advance=advance)


def compare(
    recipes: str | Path | Recipe | Sequence[str | Path | Recipe],
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
    log: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train several recipes under the same seeds, prompts and budget, and put them into one table and one page.

    Finished runs in ``output`` are kept, so the same call continues after an interruption. A run that fails is named in
    the result.

    Args:
        recipes: Names or paths, each with changes of its own as in ``"quickstart@tree.branches=4"``, or loaded recipes.
        overrides: Values by dotted key that change all recipes.
        seeds: Every recipe is trained once with each.
        iterations: The budget: iterations of the first recipe. The others take as many optimiser steps.
        rows: The budget instead: row equivalents through the denoiser for every run.
        grid: Words such as ``"tree.strength=1,2,4"``, each of which makes a row of every recipe and value.
        jobs: Runs at a time.
        output: The folder of the runs, the table and the page.
        smoke: Whether to use the recipes' small models and rewards.
        title: The title of table and page.
        log: Called with a line of text for every run.

    Raises:
        BranchTreeError: A recipe is wrong, or ``output`` has another comparison.
    """
    from branchtree.studies.common.grids import parse_grid
    from branchtree.studies.compare import Budget, ComparisonRequest, run_comparison
    from branchtree.studies.compare.request import multiply, parse_recipe

    given = [recipes] if isinstance(recipes, str | Path | Recipe) else recipes
    request = ComparisonRequest(
        rows=tuple(multiply([parse_recipe(each) for each in given], [parse_grid(text) for text in grid])),
        seeds=tuple(seeds),
        budget=Budget(iterations, rows),
        shared=dict(overrides or {}),
        smoke=smoke,
        title=title,
    )
    return run_comparison(request, user_path(output), jobs, log)


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

    Args:
        run_or_recipe: As for ``evaluate``.
        overrides: Values by dotted key of the recipe.
        samples: Size of each set, rounded up to whole trees.
        features: Feature spaces by name, with settings as in ``"clip normalize=true"``.
        prompts: A file of prompts; those to train on by default.
        grid: Words such as ``"tree.strength=1,2,4"``: ways to branch, tried in all combinations.
        shared_noise: Whether plain samples, too, come in groups that start from one initial noise.
        seed: Seed of all noise; the recipe's by default.
        output: The folder for the figures; by default ``diversity`` in the run's directory, or
            ``runs/diversity-<recipe name>``.
        smoke: Whether to use the recipe's small model.
        advance: Called with the number of samples made and wanted.

    Raises:
        BranchTreeError: Something is wrong. It is raised before anything is loaded if it can be known then.
    """
    from branchtree.studies.diversity import DiversityChoices, make_diversity_request, run_study

    spaces = (features,) if isinstance(features, str) else tuple(features)
    source, folder = (None if path is None else user_path(path) for path in (prompts, output))
    choices = DiversityChoices(samples, spaces, source, grid, folder, seed, shared_noise, smoke)
    return run_study(make_diversity_request(run_or_recipe, overrides, choices), advance)


def write_report(run: str | Path) -> Path:
    """Write a run's report.html from its files, and return its path. Raises OutputError if there is no run."""
    from branchtree.report import write_page

    return write_page(user_path(run))


def export(
    run: str | Path,
    format: Format = "diffusers",
    *,
    output: str | Path | None = None,
    push: str | None = None,
    private: bool = False,
) -> Exported:
    """Write a finished run's weights for other programs, and upload them where ``push`` asks for it.

    Args:
        run: The run's directory.
        format: How a LoRA's layers are named: ``diffusers``, ``kohya`` (sd-scripts and musubi-tuner) or ``comfyui``. A
            run that trained all weights is copied whole, as ``diffusers``.
        output: The file, or the folder of a whole model; by default in ``export`` in the run's directory.
        push: ``ORG/NAME`` on the Hugging Face hub, where the run's ``final/`` with its card is uploaded to, and files
            of another format beside it. Nothing leaves the machine without it.
        private: With ``push``: whether a repository that is made for it is private.

    Raises:
        BranchTreeError: The run is not finished, its model or LoRA has no such names, or the hub refuses.
    """
    from branchtree.exporting.hub import push_run
    from branchtree.exporting.lora import export_run

    root = user_path(run)
    done = export_run(root, format, None if output is None else user_path(output))
    if push is None:
        return done
    return replace(done, address=push_run(root, push, () if format == "diffusers" else done.files, private))


def convert_config(
    file: str | Path, config: str | None = None, *, base: str | None = None, gpus: int | None = None
) -> ConvertedConfig:
    """Return a recipe made of another trainer's configuration, which is read and never run.

    Args:
        file: A Python file of Flow-GRPO, or a shell script of DanceGRPO or MixGRPO.
        config: The function of a Python file whose configuration it is.
        base: The recipe to extend; by default the bundled one for the same model.
        gpus: How many GPUs the configuration is for, where the file does not say.

    Raises:
        BranchTreeError: The file cannot be read, or no bundled recipe is about its model.
    """
    from branchtree.migration.convert import convert_file

    return convert_file(user_path(file), config, base, gpus)
