"""What a comparison leaves behind: ``diversity.json`` with all figures and all that they depend on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from branchtree.files.writing import write_atomically
from branchtree.studies.diversity.blocks import DRAWS
from branchtree.studies.diversity.request import RESULT, DiversityRequest
from branchtree.studies.diversity.study import Study

ESTIMATORS = {
    "kid": "unbiased MMD^2 under the cubic kernel, mean and deviation over subsets; all samples as independent",
    "unbiased": "U-statistic over all pairs of different samples; all samples as independent",
    "biased": "V-statistic over all pairs",
    "groups": "U-statistic over pairs of different groups, prompts held fixed; percentile block bootstrap over groups",
}
KERNELS = {"cubic": "(x.y / D + 1)^3", "rbf": "exp(-|x - y|^2 / (2 bandwidth^2)), bandwidth the median distance"}


def write_study(study: Study) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps(_record(study), ensure_ascii=False, indent=2)
    write_atomically(study.request.output / RESULT, f"{text}\n".encode())


def _record(study: Study) -> dict[str, Any]:
    request, deal = study.request, study.request.deal
    return {
        "recipe": request.recipe.name,
        "run": None if request.subject.run is None else str(request.subject.run),
        "iteration": request.subject.iteration,
        "samples": deal.samples,
        "groups": deal.groups,
        "group_size": deal.size,
        "prompts": [condition.prompt for condition in deal.conditions],
        "seed": deal.seed,
        "sets": sets_in_words(request),
        "features": study.backends,
        "kernels": KERNELS,
        "estimators": ESTIMATORS,
        "bootstrap_draws": DRAWS,
        "discrepancies": [asdict(each) for each in study.discrepancies],
        "within_group_distance": [asdict(row) for row in study.groups],
        "settings": request.recipe.model_dump(mode="json"),
    }


def sets_in_words(request: DiversityRequest) -> dict[str, str]:
    """How each set was sampled."""
    shared = "from one initial noise each" if request.shared_noise else "each sample from an initial noise of its own"
    plain = f"independent trajectories under the same sampler and stochastic steps, in groups {shared}"
    words = {
        "branched": "leaves of the recipe's trees",
        "plain": plain,
        "control": f"{plain}; other noises than plain's",
    }
    own = "independent trajectories, each from an initial noise of its own"
    return {**words, "independent": own} if request.shared_noise else words
