"""An evaluation from its first sample to its files: figures, every sample's scores, and pictures side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError
from branchtree.files.reading import whole_text
from branchtree.files.writing import write_atomically
from branchtree.pictures.grid import drawn, write_contents, write_pictures
from branchtree.plugins.protocols import LoadsLora
from branchtree.plugins.values import LoraSummary
from branchtree.recipe.build import make_sampler
from branchtree.studies.common.intervals import LEVEL, RESAMPLES
from branchtree.studies.common.output import Advance, counter, write_document, write_lines
from branchtree.studies.common.subject import Subject
from branchtree.studies.evaluate.figures import RewardComparison, compare_scores
from branchtree.studies.evaluate.request import (
    GRID,
    RESULT,
    SAMPLES,
    EvaluationChoices,
    EvaluationRequest,
    make_evaluation_request,
)
from branchtree.studies.score.run import file_scores
from branchtree.training.conditioning import open_cache
from branchtree.training.engine import WeightAverage
from branchtree.training.evaluation import Evaluated, Evaluator, Pair
from branchtree.training.limits import RowLimits
from branchtree.training.loading import load_model, load_rewards, make_accelerator
from branchtree.training.policy import Policy
from branchtree.training.trained import restore_weights

NOISES_SHOWN = 4
"""Samples of a prompt in a grid of images; a video's strip of frames is as wide as these."""
INTERVAL = "studentised bootstrap over prompts, no narrower than Student's t"


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation came to, and where its files are."""

    output: Path
    recipe: str  # its name
    iteration: int | None  # that the model was trained for; None for the base model alone
    prompts: int
    noises: int  # samples per prompt
    rewards: Mapping[str, RewardComparison]  # by label
    main_process: bool  # whether this process is the one that reports
    lora: LoraSummary | None = None  # the file that was judged in place of a run's own weights

    @property
    def alone(self) -> bool:
        """Return whether the base model was judged alone."""
        return self.iteration is None and self.lora is None


def evaluate_subject(subject: Subject, choices: EvaluationChoices, advance: Advance | None = None) -> EvaluationResult:
    """Judge a run's model, a LoRA or a base model; see ``branchtree.evaluate``."""
    request = make_evaluation_request(subject, choices)
    quiet = request.recipe.run.model_copy(update={"trackers": ()})  # an evaluation is tracked by nothing
    accelerator = make_accelerator(request.recipe.model_copy(update={"run": quiet}))
    load_model(request.recipe, request.model, accelerator.device)
    lora = _load_lora(request)
    load_rewards(request.rewards, request.model.modality, accelerator.device)
    models = _sample(request, accelerator, advance)
    base, trained = models["base"], models.get("trained")
    prompts = [prompt for prompt, _ in base.pairs]
    figures = {
        label: compare_scores(scores, trained.scores[label] if trained else None, prompts, request.section.seed)
        for label, scores in base.scores.items()
    }
    if accelerator.is_main_process:
        (request.output / RESULT).unlink(missing_ok=True)  # an earlier evaluation's does not go with new samples
        write_lines(request.output / SAMPLES, _rows(request, models))
        _write_grid(request, models)
        write_document(request.output / RESULT, _record(request, figures, lora))
    accelerator.wait_for_everyone()
    return EvaluationResult(
        output=request.output,
        recipe=request.recipe.name,
        iteration=subject.iteration,
        prompts=len(request.conditions),
        noises=request.section.noises,
        rewards=figures,
        main_process=accelerator.is_main_process,
        lora=lora,
    )


def _load_lora(request: EvaluationRequest) -> LoraSummary | None:
    """Put the LoRA that is judged on the loaded model. Raises CheckpointError for one that does not fit."""
    source, model = request.subject.lora, request.model
    if source is None or not isinstance(model, LoadsLora):
        return None
    try:
        return model.load_lora(source)
    except CheckpointError as error:
        raise CheckpointError(f"lora: {error}") from error


def _sample(request: EvaluationRequest, accelerator: Any, advance: Advance | None) -> dict[str, Evaluated]:
    """Return the samples of the base model and, with a checkpoint's or a LoRA's weights in it, of the trained one."""
    model, checkpoint, lora = request.model, request.subject.checkpoint, request.subject.lora
    evaluator, shown = _evaluator(request, accelerator), _shown(request)
    compared = 1 if checkpoint is None and lora is None else 2
    count = counter(advance, compared * len(request.conditions) * request.section.noises)

    def samples() -> Evaluated:
        return evaluator.samples(accelerator, shown, count)

    with nullcontext() if lora is None else model.without_lora(model.denoiser):
        base = samples()
    if lora is not None:
        return {"base": base, "trained": samples()}
    if checkpoint is None:
        return {"base": base}
    # Averaged weights, where the recipe keeps them, are what the run exports.
    decay = request.recipe.optim.ema
    weights = {name: value for name, value in model.denoiser.named_parameters() if value.requires_grad}
    average = WeightAverage(weights, decay) if decay else None
    restore_weights(checkpoint, model, average)
    with nullcontext() if average is None else average.applied():
        return {"base": base, "trained": samples()}


def _evaluator(request: EvaluationRequest, accelerator: Any) -> Evaluator:
    recipe, model, device = request.recipe, request.model, accelerator.device
    limits = RowLimits(recipe.batch, request.section.rows)
    cache, sampler = open_cache(recipe.run, model, device), make_sampler(recipe, model)
    policy = Policy(model, cache, sampler, recipe.autocast, device, limits.evaluation)
    background = recipe.scoring.overlap
    return Evaluator(request.section, request.conditions, request.rewards, policy, limits, background)


def _shown(request: EvaluationRequest) -> frozenset[Pair]:
    """Return the samples of the grid: as many prompts as a run shows, and the first of their noises."""
    prompts = min(request.recipe.run.sample_prompts, len(request.conditions))
    noises = 1 if request.model.modality == "video" else min(request.section.noises, NOISES_SHOWN)
    return frozenset((prompt, noise) for prompt in range(prompts) for noise in range(noises))


def _rows(request: EvaluationRequest, models: Mapping[str, Evaluated]) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample of each model."""
    for model, samples in models.items():
        scores = {label: file_scores(given) for label, given in samples.scores.items()}
        for index, (prompt, noise) in enumerate(samples.pairs):
            yield {
                "model": model,
                "prompt": request.conditions[prompt].prompt,
                "prompt_index": prompt,
                "noise": noise,
                "rewards": {label: asdict(given[index]) for label, given in scores.items()},
            }


def _write_grid(request: EvaluationRequest, models: Mapping[str, Evaluated]) -> None:
    """Draw a row for each prompt; for each of its noises the base model's sample and, beside it, the trained one's."""
    shown = models["base"].media
    prompts = sorted({prompt for prompt, _ in shown})
    columns = [(noise, model) for noise in sorted({noise for _, noise in shown}) for model in models]
    samples = [models[model].media[prompt, noise] for prompt in prompts for noise, model in columns]
    conditions = [request.conditions[prompt] for prompt in prompts for _ in columns]
    write_contents(request.output / GRID, samples, conditions)
    media = drawn(samples, conditions)
    if not media:
        return
    layout = write_pictures(request.output / GRID, media, len(columns))
    index = {
        "rows": [request.conditions[prompt].prompt for prompt in prompts],
        **layout,
        "columns": [{"noise": noise, "model": model} for noise, model in columns],
    }
    write_atomically(request.output / f"{GRID}.json", json.dumps(index, ensure_ascii=False).encode())


def _record(
    request: EvaluationRequest, figures: Mapping[str, RewardComparison], lora: LoraSummary | None
) -> dict[str, Any]:
    """Return all figures, and all that they depend on."""
    subject, section = request.subject, request.section
    return {
        "recipe": request.recipe.name,
        "run": None if subject.run is None else whole_text(str(subject.run)),
        "iteration": subject.iteration,
        "lora": None if lora is None else {**asdict(lora), "path": whole_text(lora.path)},
        "averaged_weights": subject.checkpoint is not None and request.recipe.optim.ema is not None,
        "figures": {label: asdict(figure) for label, figure in figures.items()},
        "interval": {"method": INTERVAL, "level": LEVEL, "resamples": RESAMPLES, "seed": section.seed},
        "settings": {
            "noises": section.noises,
            "rows": section.rows,
            "seed": section.seed,
            "prompts": [condition.prompt for condition in request.conditions],
            "rewards": {reward.label: reward.described for reward in request.rewards},
            "recipe": request.recipe.model_dump(mode="json"),
        },
    }
