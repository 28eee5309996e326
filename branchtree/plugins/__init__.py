"""What the library asks of models, rewards and callbacks, and how it finds them.

A plug-in imports what it needs from here.
"""

from branchtree.core.scores import Scores
from branchtree.plugins.base import ModelBase
from branchtree.plugins.hookspecs import Register, hookimpl
from branchtree.plugins.protocols import (
    Callback,
    Condition,
    Conditioning,
    Footprint,
    LoraSettings,
    Media,
    ModelAdapter,
    RewardAdapter,
    RewardCard,
    RewardFootprint,
)

__all__ = [
    "Callback",
    "Condition",
    "Conditioning",
    "Footprint",
    "LoraSettings",
    "Media",
    "ModelAdapter",
    "ModelBase",
    "Register",
    "RewardAdapter",
    "RewardCard",
    "RewardFootprint",
    "Scores",
    "hookimpl",
]
