"""The hooks through which models, rewards and the exchangeable rules of the method arrive, built-in ones included.

A plug-in is a module named by an entry point of the group ``branchtree`` that implements any of these
with ``@hookimpl``. Each hook is handed a ``register`` callback; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pluggy

GROUP = "branchtree"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

Register = Callable[..., None]


@hookspec
def register_models(register: Register) -> None:
    """``register(name, build=Adapter, config=ConfigModel, summary="one line")`` for each model family."""


@hookspec
def register_rewards(register: Register) -> None:
    """``register(name, build=Reward, config=ConfigModel, summary="one line")``, and ``card=RewardCard(...)`` if any."""


@hookspec
def register_features(register: Register) -> None:
    """``register(name, build=FeatureSpace, config=ConfigModel, summary="one line")`` for each feature space."""


@hookspec
def register_recipes(register: Callable[[Path], None]) -> None:
    """``register(folder)`` for each folder of recipe YAML files."""


@hookspec
def register_callbacks(register: Register) -> None:
    """``register(name, build=factory, config=ConfigModel, summary="one line")`` for each callback."""


@hookspec
def register_transitions(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each kind of denoising step.

    ``build(config, section, prediction)`` gets the ``sampler`` section and what the model predicts. It returns a
    ``branchtree.core.transitions.Kernel``, or raises RecipeError if the two do not suit each other.
    """


@hookspec
def register_siblings(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each relation of siblings' noises.

    ``build(config, section)`` gets the ``tree`` section and returns a ``branchtree.core.noise.Siblings``.
    """


@hookspec
def register_splits(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each rule of where trees split.

    ``build(config, section, seed)`` gets the ``tree`` section and the run's seed and returns a
    ``branchtree.core.schedule.Splits``.
    """


@hookspec
def register_estimators(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each estimator of advantages.

    ``build(config, section)`` gets the ``credit`` section and returns a ``branchtree.core.advantages.Estimator``.
    """


@hookspec
def register_pruning(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each rule of which edges are trained.

    ``build(config, section)`` gets the ``pruning`` section and returns a ``branchtree.core.pruning.Prune``, or
    None for no pruning.
    """


@hookspec
def register_ratios(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each ratio of new to old of an edge.

    ``build(config, section)`` gets the ``loss`` section and returns a ``branchtree.core.loss.EdgeRatio``.
    """


@hookspec
def register_losses(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each loss of an edge.

    ``build(config, section)`` gets the ``loss`` section and returns a ``branchtree.core.loss.EdgeLoss``.
    """


@hookspec
def register_weightings(register: Register) -> None:
    """``register(name, build=..., config=ConfigModel, summary="one line")`` for each rule that weights steps.

    ``build(config, section)`` gets the ``loss`` section and returns a ``branchtree.core.weighting.StepWeighting``, or
    None for no weights.
    """
