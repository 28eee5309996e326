"""Finding plug-ins and looking up what they registered.

Each entry point of the group ``branchtree`` is loaded separately: one that cannot be imported breaks nothing but what
it alone provides, and is named when a lookup fails. Two plug-ins that claim one name, and a misspelt hook, are errors.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pluggy
from pydantic import BaseModel, ConfigDict

from branchtree.errors import PluginError, nearest, shortened
from branchtree.plugins import hookspecs
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import RewardCard

RULES = {
    "transition": "register_transitions",
    "sibling noise": "register_siblings",
    "split rule": "register_splits",
    "advantage estimator": "register_estimators",
    "pruning rule": "register_pruning",
    "ratio": "register_ratios",
    "loss": "register_losses",
    "weighting": "register_weightings",
    "forward objective": "register_forward_losses",
}
"""The kinds of rules that a method is made of, and the hook that registers each."""


class NoKeys(BaseModel):
    """The configuration of what has no keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Entry:
    """One registered model family, reward, kind of samples, feature space, callback or rule of the method."""

    name: str
    build: Callable[..., Any]  # from a validated config, for a rule also its section; of samples the class itself
    config: type[BaseModel]
    summary: str
    distribution: str
    card: RewardCard | None = None  # of a reward that gives one


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded."""

    name: str
    distribution: str
    error: Exception

    def __str__(self) -> str:
        return (
            f"plug-in '{self.name}' of {self.distribution} cannot be loaded: {type(self.error).__name__}: {self.error}"
        )


@dataclass
class Registry:
    """All that the plug-ins registered."""

    models: dict[str, Entry] = field(default_factory=dict)
    rewards: dict[str, Entry] = field(default_factory=dict)
    samples: dict[str, Entry] = field(default_factory=dict)  # by modality
    callbacks: dict[str, Entry] = field(default_factory=dict)
    features: dict[str, Entry] = field(default_factory=dict)
    rules: dict[str, dict[str, Entry]] = field(default_factory=lambda: {kind: {} for kind in RULES})
    recipe_folders: list[Path] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    def model(self, name: str) -> Entry:
        """The model family of that name. Raises PluginError."""
        return self._lookup("model", self.models, name)

    def reward(self, name: str) -> Entry:
        """The reward of that name. Raises PluginError."""
        return self._lookup("reward", self.rewards, name)

    def kind(self, modality: str) -> type[Samples]:
        """The class of the samples of a modality. Raises PluginError."""
        if modality not in self.samples:
            raise PluginError(
                f"no plug-in here registers the samples '{shortened(modality)}' (hook register_samples)"
                f"{nearest(shortened(modality), self.samples)}{self.failures}"
            )
        return cast(type[Samples], self.samples[modality].build)

    def callback(self, name: str) -> Entry:
        """The callback of that name. Raises PluginError."""
        return self._lookup("callback", self.callbacks, name)

    def feature(self, name: str) -> Entry:
        """The feature space of that name. Raises PluginError."""
        return self._lookup("feature space", self.features, name)

    def rule(self, kind: str, name: str) -> Entry:
        """Return a rule of the method, such as the ``transition`` of that name. Raises PluginError."""
        return self._lookup(kind, self.rules[kind], name)

    @property
    def failures(self) -> str:
        """What closes a message about an unknown name: a line for each plug-in that might have brought it."""
        return "".join(f"\n{broken}" for broken in self.broken)

    def _lookup(self, kind: str, entries: dict[str, Entry], name: str) -> Entry:
        if name in entries:
            return entries[name]
        raise PluginError(f"no {kind} '{name}' is installed{nearest(name, entries)}{self.failures}")


@functools.cache
def registry() -> Registry:
    """The registry of what is installed, filled on first use."""
    points = [
        (point, distribution.metadata["Name"])
        for distribution in importlib.metadata.distributions()
        for point in distribution.entry_points.select(group=hookspecs.GROUP)
    ]
    return collect_plugins({(point.name, name): point.load for point, name in points}.items())


def register_here(plugin: object, name: str) -> None:
    """Register a plug-in that is not installed; see ``branchtree.register``."""
    found = registry()
    listed = (found.models, found.rewards, found.samples, found.callbacks, found.features, *found.rules.values())
    for entries in listed:
        for known in [known for known, entry in entries.items() if entry.distribution == name]:
            del entries[known]
    _register(found, name, name, plugin)


def collect_plugins(plugins: Iterable[tuple[tuple[str, str], Callable[[], object]]]) -> Registry:
    """Load plug-ins, each given as ((entry-point name, distribution), loader), and let them register.

    Raises PluginError if two claim one entry-point name or register one name, or if a hook is misspelt.
    """
    found = Registry()
    owners: dict[str, str] = {}
    for (name, distribution), load in sorted(plugins, key=lambda plugin: plugin[0]):
        if name in owners:
            raise PluginError(
                f"two plug-ins are named '{name}': one of {owners[name]}, one of {distribution}; uninstall one"
            )
        owners[name] = distribution
        try:
            _register(found, name, distribution, load())
        except PluginError:
            raise
        except Exception as error:
            # Whatever a stranger's module raises must not take the others down; it is named on lookup.
            found.broken.append(Broken(name, distribution, error))
    return found


def _register(found: Registry, name: str, distribution: str, plugin: object) -> None:
    """Call one plug-in's hooks."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    _refuse_misspelt(manager, name, distribution)
    manager.hook.register_models(register=_adder("model", found.models, distribution))
    manager.hook.register_rewards(register=_adder("reward", found.rewards, distribution))
    manager.hook.register_samples(register=_adder("kind of samples", found.samples, distribution))
    manager.hook.register_callbacks(register=_adder("callback", found.callbacks, distribution))
    manager.hook.register_features(register=_adder("feature space", found.features, distribution))
    for kind, hook in RULES.items():
        getattr(manager.hook, hook)(register=_adder(kind, found.rules[kind], distribution))
    manager.hook.register_recipes(register=found.recipe_folders.append)


def _refuse_misspelt(manager: pluggy.PluginManager, name: str, distribution: str) -> None:
    known = [hook for hook, _ in inspect.getmembers(hookspecs, inspect.isfunction) if hook.startswith("register_")]
    for hook in vars(manager.hook):
        if not hook.startswith("_") and hook not in known:
            raise PluginError(f"plug-in '{name}' of {distribution} has an unknown hook '{hook}'{nearest(hook, known)}")


def _adder(kind: str, entries: dict[str, Entry], distribution: str) -> Callable[..., None]:
    def register(
        name: str,
        *,
        build: Callable[..., Any],
        config: type[BaseModel] = NoKeys,
        summary: str,
        card: RewardCard | None = None,
    ) -> None:
        if name in entries:
            raise PluginError(
                f"two plug-ins register the {kind} '{name}': {entries[name].distribution} and {distribution}; "
                "uninstall one"
            )
        entries[name] = Entry(name, build, config, summary, distribution, card)

    return register
