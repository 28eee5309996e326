"""What a recipe injects into a leaf, and which noise level would inject as much as another recipe does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import ValidationError

from branchtree.core.injection import LeafNoise, leaf_noise
from branchtree.core.rollout import Sampler
from branchtree.core.schedule import TreePlan
from branchtree.core.transitions import ScalesNoise
from branchtree.errors import ModelError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.recipe.build import make_kernel, make_model, make_sampler, make_schedule
from branchtree.recipe.schema import Recipe, SamplerSection

MUCH_LESS = 0.5
"""A recipe whose leaves differ by less than this fraction of what others' do is warned about."""
LOOKED_AT, PROMPTS_LOOKED_AT = 100, 16
"""Iterations of a run whose plans are looked at, and prompts under a rule of splits that does not list its draws."""
FARTHEST, HALVINGS = 100.0, 60
"""How many times as large an equal noise level may be, and the steps of its search."""
NAMED = 3
"""Recipes that one warning names."""


@dataclass(frozen=True)
class PlannedNoise:
    """What a recipe injects into a leaf, and what that follows from."""

    recipe: Recipe
    model: ModelAdapter
    sampler: Sampler
    leaf: LeafNoise  # mean over the plans of the run

    def too_little(self, names: str, others: str, wanted: float) -> str | None:
        """Say what to change if leaves differ much less than by ``wanted``, as under ``others``; else None.

        ``names`` are those of this recipe and of others that inject the same, as they are to be written.
        """
        own = self.leaf.differing
        if own >= MUCH_LESS * wanted:
            return None
        eta = self._equal_eta(wanted / own) if own else None
        change = (
            "no sampler.eta injects as much; make more steps stochastic (tree.sde), or choose another sampler.kind"
            if eta is None
            else f"sampler.eta={eta:.3g} in place of {self.recipe.sampler.level:g} injects as much"
        )
        return (
            f"a prompt's leaves differ by a noise of {own:.3g} under {names}, and of {wanted:.3g} under {others}; if "
            f"their rewards hardly differ, {change}"
        )

    def _equal_eta(self, factor: float) -> float | None:
        """Return the ``sampler.eta`` at which the noise is ``factor`` times as large; None if there is none."""
        size = self._scale(self.recipe.sampler.level)
        wanted = factor * size if size else 0.0
        low, high = self.recipe.sampler.level, FARTHEST * self.recipe.sampler.level
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            size = self._scale(middle)
            low, high = (low, middle) if size is None or size >= wanted else (middle, high)
        size = self._scale(low)
        return low if size is not None and size > 0.999 * wanted else None

    def _scale(self, eta: float) -> float | None:
        """Return the size of all steps' noise at a noise level; None for one that the kernel does not take."""
        try:
            section = SamplerSection.model_validate({**self.recipe.sampler.model_dump(), "eta": eta})
        except ValidationError:
            return None
        kernel = make_kernel(section, self.model.prediction)
        return float(self.sampler.noise_scale(kernel).norm()) if isinstance(kernel, ScalesNoise) else None


def planned_noise(recipe: Recipe, model: ModelAdapter | None = None) -> PlannedNoise | None:
    """Return what a recipe injects; None for a transition without a scale, or a grid that only a loaded model has.

    Raises a BranchTreeError for a recipe that cannot be planned.
    """
    model = model or make_model(recipe)
    try:
        sampler = make_sampler(recipe, model)
    except ModelError:
        return None
    kernel = sampler.kernel
    if not isinstance(kernel, ScalesNoise):
        return None
    return PlannedNoise(recipe, model, sampler, leaf_noise(_plans(recipe), sampler.noise_scale(kernel)))


def _plans(recipe: Recipe) -> list[TreePlan]:
    schedule, total = make_schedule(recipe), recipe.run.iterations
    iterations = sorted({index * total // LOOKED_AT for index in range(LOOKED_AT)})
    return [plan for iteration in iterations for plan in schedule.possible_plans(iteration, PROMPTS_LOOKED_AT)]


def compare_noise(noises: Mapping[str, PlannedNoise]) -> list[str]:
    """Return a warning for the recipes, by name, that make leaves differ much less than most of the others do.

    Those that inject the same at the same noise level, such as the values of a grid, have one warning.
    """
    alike: dict[tuple[float, float], list[str]] = {}
    for name, noise in noises.items():
        alike.setdefault((noise.leaf.differing, noise.recipe.sampler.level), []).append(name)
    warnings = []
    for names in alike.values():
        others = {name: noise.leaf.differing for name, noise in noises.items() if name not in names}
        if others:
            named = f"'{next(iter(others))}'" if len(others) == 1 else "the others (their median)"
            warnings.append(noises[names[0]].too_little(_listed(names), named, median(others.values())))
    return [warning for warning in warnings if warning is not None]


def _listed(names: Sequence[str]) -> str:
    """Return names in quotation marks, the first few of many."""
    more = len(names) - NAMED
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + (f" and {more} more" if more > 0 else "")
