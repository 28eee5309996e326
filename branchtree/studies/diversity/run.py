"""A study of diversity from its first sample to ``diversity.json``: all figures, and all that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from branchtree.planning.devices import named_device
from branchtree.recipe.build import make_sampler
from branchtree.studies.common.output import Advance, counter, write_document
from branchtree.studies.diversity.blocks import DRAWS
from branchtree.studies.diversity.cache import FeatureCache, describe, weights_digest
from branchtree.studies.diversity.figures import (
    Discrepancy,
    DistanceSpread,
    compare_sets,
    distance_spread,
    pairwise_distance,
)
from branchtree.studies.diversity.request import RESULT, DiversityRequest
from branchtree.studies.diversity.sampling import BRANCHED, CONTROL, PLAIN, FeatureSamples, PlannedSet, draw_samples
from branchtree.studies.diversity.spaces import load_spaces
from branchtree.training.conditioning import open_cache
from branchtree.training.loading import load_model
from branchtree.training.policy import Policy
from branchtree.training.trained import restore_weights

CACHE = "features"
LATENTS = "latents"
ESTIMATORS = {
    "kid": "unbiased MMD^2 under the cubic kernel, mean and deviation over subsets; all samples as independent",
    "unbiased": "U-statistic over all pairs of different samples; all samples as independent",
    "biased": "V-statistic over all pairs",
    "groups": "U-statistic over pairs of different groups, prompts held fixed; percentile block bootstrap over groups",
}
KERNELS = {"cubic": "(x.y / D + 1)^3", "rbf": "exp(-|x - y|^2 / (2 bandwidth^2)), bandwidth the median distance"}


@dataclass(frozen=True)
class GroupRow:
    """How far a set's samples of one group lie from each other."""

    name: str  # of the set, or the grid's values
    size: int  # samples of a group
    spreads: dict[str, DistanceSpread | None]  # by feature space, latents among them


@dataclass(frozen=True)
class Study:
    """All figures of a study of diversity."""

    request: DiversityRequest
    backends: dict[str, str]  # by feature space
    discrepancies: Sequence[Discrepancy]
    groups: Sequence[GroupRow]


def run_study(request: DiversityRequest, advance: Advance | None = None) -> Study:
    """Sample what is not kept on disk, compare, and write ``diversity.json``. Raises a BranchTreeError."""
    policy = load_policy(request)
    cache, weights = FeatureCache(request.output / CACHE), weights_digest(policy.model.denoiser)
    count = counter(advance, sum(planned.layout.samples for planned in request.sets))
    drawn: dict[str, FeatureSamples] = {}
    rows: list[GroupRow] = []
    for planned in request.sets:
        described = describe(planned, weights)
        found = cache.read(described, request.spaces)
        if found is None:
            found = draw_samples(policy, planned, request.spaces, count)
            cache.write(described, request.spaces, found)
        else:
            count(planned.layout.samples)
        drawn.setdefault(planned.name, found)
        rows.append(_group_row(planned, found))
    pairs, layout = [(BRANCHED.name, PLAIN.name), (CONTROL.name, PLAIN.name)], request.layout
    discrepancies: list[Discrepancy] = []
    for named in request.spaces:
        sets = {name: drawn[name].features[named.label] for name in (BRANCHED.name, PLAIN.name, CONTROL.name)}
        discrepancies += compare_sets(named.label, sets, pairs, layout.prompt, layout.size, layout.seed)
    study = Study(request, {named.label: named.space.backend for named in request.spaces}, discrepancies, rows)
    write_document(request.output / RESULT, _record(study))
    return study


def load_policy(request: DiversityRequest) -> Policy:
    """Load the model with the weights that are asked about, and the feature spaces."""
    recipe, model, device = request.recipe, request.model, named_device("auto")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    load_spaces(request.spaces, device)
    load_model(recipe, model, device)
    if request.subject.checkpoint is not None:
        restore_weights(request.subject.checkpoint, model, None)  # the policy's own weights, not their average

    cache = open_cache(recipe.run, model, device)
    return Policy(model, cache, make_sampler(recipe, model), recipe.autocast, device)


def _group_row(planned: PlannedSet, drawn: FeatureSamples) -> GroupRow:
    size = planned.layout.size
    distances = {LATENTS: drawn.latent_distance}
    for label, features in drawn.features.items():
        distances[label] = pairwise_distance(features.unflatten(0, (-1, size)))
    return GroupRow(planned.name, size, {label: distance_spread(distance) for label, distance in distances.items()})


def _record(study: Study) -> dict[str, Any]:
    request, layout = study.request, study.request.layout
    return {
        "recipe": request.recipe.name,
        "run": None if request.subject.run is None else str(request.subject.run),
        "iteration": request.subject.iteration,
        "samples": layout.samples,
        "groups": layout.groups,
        "group_size": layout.size,
        "prompts": [condition.prompt for condition in layout.conditions],
        "seed": layout.seed,
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
    """Say how each set was sampled."""
    shared = "from one initial noise each" if request.shared_noise else "each sample from an initial noise of its own"
    plain = f"independent trajectories under the same sampler and stochastic steps, in groups {shared}"
    words = {
        "branched": "leaves of the recipe's trees",
        "plain": plain,
        "control": f"{plain}; other noises than plain's",
    }
    own = "independent trajectories, each from an initial noise of its own"
    return {**words, "independent": own} if request.shared_noise else words
