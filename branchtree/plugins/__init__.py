"""What the library asks of models, rewards and callbacks, and how it finds them.

A plug-in imports what it needs from here.
"""

from branchtree.core.scores import Scores
from branchtree.plugins.base import Callback, ModelBase
from branchtree.plugins.hookspecs import Register, hookimpl
from branchtree.plugins.protocols import ModelAdapter, RewardAdapter
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.values import (
    Condition,
    Conditioning,
    DecoderFootprint,
    Footprint,
    LoraSettings,
    LoraSummary,
    ModelCard,
    QuantizableFootprint,
    RewardCard,
    RewardFootprint,
)

__all__ = [
    "Callback",
    "Condition",
    "Conditioning",
    "DecoderFootprint",
    "Footprint",
    "LoraSettings",
    "LoraSummary",
    "Media",
    "ModelAdapter",
    "ModelBase",
    "ModelCard",
    "QuantizableFootprint",
    "Register",
    "RewardAdapter",
    "RewardCard",
    "RewardFootprint",
    "Samples",
    "Scores",
    "hookimpl",
]
