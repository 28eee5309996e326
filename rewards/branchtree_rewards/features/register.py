"""The feature spaces that samples are compared in: `inception`, `clip`, `digits` and `pixels`."""

from __future__ import annotations

from collections.abc import Callable

from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.features.clip import ClipFeatures, ClipFeaturesConfig
from branchtree_rewards.features.digits import (
    DigitsFeatures,
    DigitsFeaturesConfig,
    PixelsFeatures,
    PixelsFeaturesConfig,
)
from branchtree_rewards.features.inception import InceptionFeatures, InceptionFeaturesConfig


@hookimpl
def register_features(register: Callable[..., None]) -> None:
    """Add the feature spaces to the registry."""
    register(
        "inception",
        build=InceptionFeatures,
        config=InceptionFeaturesConfig,
        summary="Pooled features of the FID Inception, by torch-fidelity, from a weights file that you name.",
    )
    register(
        "clip",
        build=ClipFeatures,
        config=ClipFeaturesConfig,
        summary="Projected image features of OpenAI's CLIP, raw or scaled to length 1.",
    )
    register(
        "digits",
        build=DigitsFeatures,
        config=DigitsFeaturesConfig,
        summary="What a bundled digit classifier's last layer reads.",
    )
    register(
        "pixels",
        build=PixelsFeatures,
        config=PixelsFeaturesConfig,
        summary="The picture itself, shrunk.",
    )
