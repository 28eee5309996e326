"""The hooks through which models, rewards, feature spaces, recipes and callbacks arrive, built-in ones included.

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
    """``register(name, build=Reward, config=ConfigModel, summary="one line", card=RewardCard(...))`` for each reward.

    The card is optional.
    """


@hookspec
def register_features(register: Register) -> None:
    """``register(name, build=FeatureSpace, config=ConfigModel, summary="one line")`` for each feature space."""


@hookspec
def register_recipes(register: Callable[[Path], None]) -> None:
    """``register(folder)`` for each folder of recipe YAML files."""


@hookspec
def register_callbacks(register: Register) -> None:
    """``register(name, build=factory, config=ConfigModel, summary="one line")`` for each callback."""
