"""A comparison from its first sample to its figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from branchtree.planning.devices import named_device
from branchtree.recipe.build import make_sampler, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.studies.diversity.cache import FeatureCache, describe, weights_digest
from branchtree.studies.diversity.comparison import Discrepancy, compare_sets
from branchtree.studies.diversity.request import DiversityRequest
from branchtree.studies.diversity.sampling import (
    BRANCHED,
    CONTROL,
    INDEPENDENT,
    PLAIN,
    Deal,
    FeatureSamples,
    Kind,
    SampledPolicy,
    draw_samples,
)
from branchtree.studies.diversity.spaces import load_spaces
from branchtree.studies.diversity.spread import DistanceSpread, distance_spread, grouped, pairwise_distance
from branchtree.training.conditioning import open_cache
from branchtree.training.loading import load_model
from branchtree.training.trained import restore_weights

CACHE = "features"
LATENTS = "latents"
COMPARED = (BRANCHED.name, PLAIN.name, CONTROL.name)

Advance = Callable[[int, int], None]
"""Told how many samples there are, and how many there will be."""


@dataclass(frozen=True)
class GroupRow:
    """How far a set's samples of one group lie from each other."""

    name: str  # of the set, or the grid's values
    size: int  # samples of a group
    spreads: dict[str, DistanceSpread | None]  # by feature space, latents among them


@dataclass(frozen=True)
class Study:
    """All figures."""

    request: DiversityRequest
    backends: dict[str, str]  # by feature space
    discrepancies: Sequence[Discrepancy]
    groups: Sequence[GroupRow]


@dataclass(frozen=True)
class _Draw:
    """A set that is needed."""

    name: str
    kind: Kind
    recipe: Recipe
    deal: Deal


def run_study(request: DiversityRequest, advance: Advance | None = None) -> Study:
    """Sample what is not kept on disk, and compare. Raises a BranchTreeError."""
    policy, draws = _load(request), _draws(request)
    sets = _draw_all(request, policy, draws, advance)
    rows = [_group_row(draw.name, drawn, draw.deal.size) for draw, drawn in zip(draws, sets, strict=True)]
    compared = {draw.name: drawn for draw, drawn in zip(draws, sets, strict=True) if draw.name in COMPARED}
    discrepancies = [
        each
        for named in request.spaces
        for each in compare_sets(
            named.label,
            {name: drawn.features[named.label] for name, drawn in compared.items()},
            [(BRANCHED.name, PLAIN.name), (CONTROL.name, PLAIN.name)],
            request.deal.prompt,
            request.deal.size,
            request.deal.seed,
        )
    ]
    return Study(request, {named.label: named.space.backend for named in request.spaces}, discrepancies, rows)


def _draws(request: DiversityRequest) -> list[_Draw]:
    """The sets that are compared, then those that only distances within groups are of."""
    shared = request.shared_noise
    kinds = [BRANCHED, *(replace(kind, shared=shared) for kind in (PLAIN, CONTROL)), *([INDEPENDENT] if shared else [])]
    draws = [_Draw(kind.name, kind, request.recipe, request.deal) for kind in kinds]
    return draws + [_Draw(cell.name, BRANCHED, cell.recipe, cell.deal) for cell in request.cells]


def _load(request: DiversityRequest) -> SampledPolicy:
    """The model with the weights that are asked about, and the feature spaces."""
    recipe, model, device = request.recipe, request.model, named_device("auto")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    load_spaces(request.spaces, device)
    load_model(recipe, model, device)
    if request.subject.checkpoint is not None:
        restore_weights(request.subject.checkpoint, model, None)  # the policy's own weights, not their average

    def autocast() -> contextlib.AbstractContextManager[None]:
        return torch.autocast(device.type, torch.bfloat16, enabled=recipe.autocast)

    return SampledPolicy(
        model=model,
        cache=open_cache(recipe.run, model, device),
        sampler=make_sampler(recipe, model),
        schedule=make_schedule(recipe),
        batch=recipe.batch,
        autocast=autocast,
        device=device,
    )


def _draw_all(
    request: DiversityRequest, policy: SampledPolicy, draws: Sequence[_Draw], advance: Advance | None
) -> list[FeatureSamples]:
    """All sets, from the disk where they are there."""
    cache, weights = FeatureCache(request.output / CACHE), weights_digest(policy.model.denoiser)
    whole, done = sum(draw.deal.samples for draw in draws), 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if advance is not None:
            advance(done, whole)

    sets: list[FeatureSamples] = []
    for draw in draws:
        recipe = draw.recipe
        described = describe(recipe, weights, draw.kind, draw.deal)
        found = cache.read(described, request.spaces)
        if found is None:
            changed = replace(
                policy, sampler=make_sampler(recipe, policy.model), schedule=make_schedule(recipe), batch=recipe.batch
            )
            found = draw_samples(changed, draw.kind, draw.deal, request.spaces, count)
            cache.write(described, request.spaces, found)
        else:
            count(draw.deal.samples)
        sets.append(found)
    return sets


def _group_row(name: str, drawn: FeatureSamples, size: int) -> GroupRow:
    distances = {LATENTS: drawn.latent_distance}
    distances |= {label: pairwise_distance(grouped(value, size)) for label, value in drawn.features.items()}
    return GroupRow(name, size, {label: distance_spread(distance) for label, distance in distances.items()})
