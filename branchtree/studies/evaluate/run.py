"""An evaluation from its first sample to its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError
from branchtree.plugins.protocols import LoadsLora
from branchtree.plugins.values import LoraSummary
from branchtree.recipe import Recipe
from branchtree.recipe.build import make_sampler
from branchtree.studies.evaluate.comparison import RewardComparison, compare_scores
from branchtree.studies.evaluate.files import EvaluationOutcome, write_files
from branchtree.studies.evaluate.request import EvaluationChoices, EvaluationRequest, make_evaluation_request
from branchtree.studies.evaluate.subject import find_subject
from branchtree.training.checkpoint import restore_weights
from branchtree.training.conditioning import open_cache
from branchtree.training.engine import WeightAverage
from branchtree.training.evaluation import Evaluator, Pair, Samples
from branchtree.training.limits import RowLimits
from branchtree.training.policy import Policy
from branchtree.training.session import load_model, load_rewards, make_accelerator

NOISES_SHOWN = 4
"""Samples of a prompt in a grid of images; a video's strip of frames is as wide as these."""

Advance = Callable[[int, int], None]
"""Called with the number of samples that this process has made, and that all processes will make."""


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
        """Whether the base model was judged alone."""
        return self.iteration is None and self.lora is None


def evaluate_subject(
    subject: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    choices: EvaluationChoices | None = None,
    *,
    smoke: bool = False,
    checkpoint: int | None = None,
    advance: Advance | None = None,
) -> EvaluationResult:
    """Evaluate a run or a recipe's base model; see ``branchtree.evaluate``."""
    choices = choices or EvaluationChoices()
    request = make_evaluation_request(find_subject(subject, overrides, smoke, checkpoint, choices.lora), choices)
    quiet = request.recipe.run.model_copy(update={"trackers": ()})  # an evaluation is tracked by nothing
    recipe = request.recipe.model_copy(update={"run": quiet})
    accelerator = make_accelerator(recipe)
    load_model(recipe, request.model, accelerator.device)
    lora = _load_lora(request)
    load_rewards(request.rewards, request.model.modality, accelerator.device)
    base, trained = _both(request, accelerator, advance)
    prompts = [prompt for prompt, _ in base.pairs]
    figures = {
        label: compare_scores(scores, None if trained is None else trained.scores[label], prompts, request.draws.seed)
        for label, scores in base.scores.items()
    }
    if accelerator.is_main_process:
        write_files(request, EvaluationOutcome(base, trained, figures, lora))
    accelerator.wait_for_everyone()
    return EvaluationResult(
        output=request.output,
        recipe=recipe.name,
        iteration=request.subject.iteration,
        prompts=len(request.conditions),
        noises=request.draws.noises,
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


def _both(request: EvaluationRequest, accelerator: Any, advance: Advance | None) -> tuple[Samples, Samples | None]:
    """The samples of the base model, then, with a checkpoint's or a LoRA's weights in it, those of the trained one."""
    evaluator, checkpoint, lora = _evaluator(request, accelerator), request.subject.checkpoint, request.subject.lora
    models = 1 if checkpoint is None and lora is None else 2
    whole = models * len(request.conditions) * request.draws.noises
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if advance is not None:
            advance(done, whole)

    shown = _shown(request)
    if lora is not None:
        with request.model.without_lora(request.model.denoiser):
            base = evaluator.samples(accelerator, shown, count)
        return base, evaluator.samples(accelerator, shown, count)
    base = evaluator.samples(accelerator, shown, count)
    if checkpoint is None:
        return base, None
    average = _average(request)
    restore_weights(checkpoint, request.model, average)
    with nullcontext() if average is None else average.applied():
        return base, evaluator.samples(accelerator, shown, count)


def _average(request: EvaluationRequest) -> WeightAverage | None:
    """Room for the averaged weights, which are what the run exports, where its recipe keeps them."""
    decay = request.recipe.optim.ema
    parameters = request.model.denoiser.named_parameters()
    return WeightAverage({name: value for name, value in parameters if value.requires_grad}, decay) if decay else None


def _evaluator(request: EvaluationRequest, accelerator: Any) -> Evaluator:
    recipe, model, device = request.recipe, request.model, accelerator.device
    limits = RowLimits(recipe.batch, request.draws.rows)
    policy = Policy(
        model,
        open_cache(recipe.run, model, device),
        make_sampler(recipe, model),
        accelerator.autocast,
        device,
        limits.evaluation,
    )
    return Evaluator(
        request.draws, request.conditions, request.rewards, policy, limits, background=recipe.scoring.overlap
    )


def _shown(request: EvaluationRequest) -> frozenset[Pair]:
    """The samples of the grid: as many prompts as a run shows, and the first of their noises."""
    prompts = min(request.recipe.run.sample_prompts, len(request.conditions))
    noises = 1 if request.model.modality == "video" else min(request.draws.noises, NOISES_SHOWN)
    return frozenset((prompt, noise) for prompt in range(prompts) for noise in range(noises))
