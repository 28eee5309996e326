"""What an evaluation leaves behind: figures, every sample's scores, and pictures of the same noises side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from branchtree.files.reading import whole_text
from branchtree.files.writing import write_atomically
from branchtree.pictures.grid import write_pictures
from branchtree.plugins.values import LoraSummary
from branchtree.studies.evaluate.bootstrap import LEVEL, RESAMPLES
from branchtree.studies.evaluate.comparison import RewardComparison
from branchtree.studies.evaluate.request import GRID, RESULT, SAMPLES, EvaluationRequest
from branchtree.studies.score.results import FileScore, file_scores
from branchtree.training.evaluation import Samples

INTERVAL = "studentised bootstrap over prompts, no narrower than Student's t"


@dataclass(frozen=True)
class EvaluationOutcome:
    """Both models' samples, and each reward's figures by label."""

    base: Samples
    trained: Samples | None  # None where the base model is judged alone
    figures: Mapping[str, RewardComparison]
    lora: LoraSummary | None = None

    @property
    def models(self) -> dict[str, Samples]:
        """The samples by the name of their model, the base first."""
        return {"base": self.base} if self.trained is None else {"base": self.base, "trained": self.trained}


def write_files(request: EvaluationRequest, outcome: EvaluationOutcome) -> None:
    """Write ``samples.jsonl``, the grid, and last ``evaluation.json``, each whole or not at all."""
    (request.output / RESULT).unlink(missing_ok=True)  # those of an earlier evaluation do not go with new samples
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(request, outcome))
    write_atomically(request.output / SAMPLES, lines.encode())
    _write_grid(request, outcome)
    text = json.dumps(_record(request, outcome), ensure_ascii=False, indent=2)
    write_atomically(request.output / RESULT, f"{text}\n".encode())


def _rows(request: EvaluationRequest, outcome: EvaluationOutcome) -> Iterator[dict[str, Any]]:
    """A row for each sample of each model."""
    for model, samples in outcome.models.items():
        scores: dict[str, list[FileScore]] = {label: file_scores(given) for label, given in samples.scores.items()}
        for place, (prompt, noise) in enumerate(samples.pairs):
            yield {
                "model": model,
                "prompt": request.conditions[prompt].prompt,
                "prompt_index": prompt,
                "noise": noise,
                "rewards": {label: asdict(given[place]) for label, given in scores.items()},
            }


def _write_grid(request: EvaluationRequest, outcome: EvaluationOutcome) -> None:
    """A row for each prompt; of each of its noises the base model's sample and, beside it, the trained model's."""
    shown, models = sorted(outcome.base.media), outcome.models
    prompts = sorted({prompt for prompt, _ in shown})
    columns = [(noise, model) for noise in sorted({noise for _, noise in shown}) for model in models]
    media = [models[model].media[prompt, noise] for prompt in prompts for noise, model in columns]
    layout = write_pictures(request.output / GRID, media, len(columns))
    index = {
        "rows": [request.conditions[prompt].prompt for prompt in prompts],
        **layout,
        "columns": [{"noise": noise, "model": model} for noise, model in columns],
    }
    write_atomically(request.output / f"{GRID}.json", json.dumps(index, ensure_ascii=False).encode())


def _record(request: EvaluationRequest, outcome: EvaluationOutcome) -> dict[str, Any]:
    """All figures, and all that they depend on."""
    subject = request.subject
    return {
        "recipe": request.recipe.name,
        "run": None if subject.run is None else whole_text(str(subject.run)),
        "iteration": subject.iteration,
        "lora": None if outcome.lora is None else {**asdict(outcome.lora), "path": whole_text(outcome.lora.path)},
        "averaged_weights": subject.checkpoint is not None and request.recipe.optim.ema is not None,
        "figures": {label: asdict(figure) for label, figure in outcome.figures.items()},
        "interval": {"method": INTERVAL, "level": LEVEL, "resamples": RESAMPLES, "seed": request.draws.seed},
        "settings": {
            **asdict(request.draws),
            "prompts": [condition.prompt for condition in request.conditions],
            "rewards": {reward.label: reward.described for reward in request.rewards},
            "recipe": request.recipe.model_dump(mode="json"),
        },
    }
