"""The whole examination, in the order in which one thing needs another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from branchtree.doctor.check import Check, guarded
from branchtree.doctor.devices import check_memory, check_product, check_torch
from branchtree.doctor.hub import Hub, ask_hub, check_hub, check_repository
from branchtree.doctor.libraries import check_packages, check_plugins, check_python

if TYPE_CHECKING:
    from branchtree.recipe import Recipe


def examine(recipe: str, overrides: Mapping[str, Any]) -> Iterator[Check]:
    """Look at what a recipe needs, and yield each check as soon as it is known.

    Nothing is downloaded. Matrix product and tiny iteration are left out where a check before them fails, which would
    be their reason too.
    """
    seen: dict[Check, None] = {}
    for check in _before_work(recipe, overrides):
        if check not in seen:  # as of a reward that judges under several labels
            yield check
        seen[check] = None
    if any(check.state == "fail" for check in seen):
        for work in ("matrix product", "iteration"):
            yield Check(work, "warn", "not tried, since checks above failed", "correct those first")
        return
    from branchtree.doctor.trial import check_iteration

    yield from guarded("matrix product", check_product)
    yield from guarded("iteration", lambda: check_iteration(recipe))


def _before_work(recipe: str, overrides: Mapping[str, Any]) -> Iterator[Check]:
    yield from guarded("Python", check_python)
    yield from guarded("packages", check_packages)
    yield from guarded("accelerator", check_torch)
    yield from guarded("plug-ins", check_plugins)
    hub: list[Hub] = []
    yield from guarded("hub", lambda: _ask(hub))
    loaded: list[Recipe] = []
    yield from guarded("recipe", lambda: _load(recipe, overrides, loaded))
    yield from guarded("memory", lambda: check_memory(loaded[0] if loaded else None))
    if loaded:
        yield from _needs(loaded[0], hub[0] if hub else Hub(answers=False, offline=False, logged_in=False))


def _ask(hub: list[Hub]) -> Iterator[Check]:
    hub.append(ask_hub())
    yield from check_hub(hub[0])


def _load(recipe: str, overrides: Mapping[str, Any], loaded: list[Recipe]) -> Iterator[Check]:
    from branchtree.recipe import load_recipe

    loaded.append(load_recipe(recipe, overrides))
    yield Check("recipe", "ok", f"{loaded[0].name}: {loaded[0].description}")


def _needs(recipe: Recipe, hub: Hub) -> Iterator[Check]:
    """Look at what a valid recipe needs."""
    from branchtree.doctor.needs import check_prompts, check_rewards

    yield from guarded("prompts", lambda: check_prompts(recipe))
    yield from guarded("reward", lambda: check_rewards(recipe))
    yield from guarded("plan", lambda: _planned(recipe, hub))


def _planned(recipe: Recipe, hub: Hub) -> Iterator[Check]:
    from branchtree.doctor.needs import check_disk, check_plan, repositories
    from branchtree.planning.plan import plan_recipe

    plan = plan_recipe(recipe)
    yield check_plan(plan)
    found = list(repositories(recipe, plan, hub))
    for repository in found:
        yield check_repository(hub, repository)
    yield from check_disk(recipe, plan, sum(repository.missing for repository in found))
