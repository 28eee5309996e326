"""The feature spaces `digits` and `pixels`, which need no download."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Literal

import pydantic
import torch
from torch import Tensor

from branchtree.plugins import Media
from branchtree_rewards.digits.classifier import (
    ClassifierName,
    DigitClassifier,
    load_classifier,
    to_network_input,
    weights_name,
)
from branchtree_rewards.diversity import shrunk
from branchtree_rewards.features.frames import digest_of


class DigitsFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `digits`.

    Attributes:
        classifier: Which bundled classifier; "heldout" is the one that no recipe trains against.
    """

    classifier: Literal["reward", "heldout"] = "heldout"


class DigitsFeatures:
    """The 1,024 features that a bundled digit classifier's last layer reads, of images or of videos' last frames."""

    modalities: frozenset[str] = frozenset({"image", "video"})

    def __init__(self, config: DigitsFeaturesConfig) -> None:
        self._config = config
        self._networks: dict[str, DigitClassifier] = {}

    @property
    def _names(self) -> dict[str, ClassifierName]:
        moving: ClassifierName = "moving_reward" if self._config.classifier == "reward" else "moving_heldout"
        return {"image": self._config.classifier, "video": moving}

    @property
    def backend(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return f"input of the last layer of the bundled digit classifier '{self._config.classifier}'"

    def load(self, device: torch.device) -> None:
        """Put the classifiers of images and of video frames on ``device``."""
        self._networks = {modality: load_classifier(name, device) for modality, name in self._names.items()}

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        if not self._networks:
            raise RuntimeError("the digits features were not loaded: call load(device) first")
        network = self._networks[media.modality]
        images = media.pixels if media.modality == "image" else media.pixels[:, -1]
        found: Tensor = network.features(to_network_input(images.to(network.head.weight.device)))
        return found.flatten(1)

    def fingerprint(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        assets = files("branchtree_rewards").joinpath("assets")
        weights = [assets.joinpath(weights_name(name)).read_bytes() for name in self._names.values()]
        return digest_of("digits", *(hashlib.sha256(content).hexdigest() for content in weights))


class PixelsFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `pixels`.

    Attributes:
        size: Pixels that the longer side is shrunk to.
    """

    size: int = pydantic.Field(default=16, ge=1, le=1024)


class PixelsFeatures:
    """The numbers of the picture, or of all frames of the video, shrunk by averages."""

    modalities: frozenset[str] = frozenset({"image", "video"})

    def __init__(self, config: PixelsFeaturesConfig) -> None:
        self._config = config
        self._device = torch.device("cpu")

    @property
    def backend(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return f"pixels in [0, 1], the longer side shrunk to {self._config.size}"

    def load(self, device: torch.device) -> None:
        """Shrink on ``device``."""
        self._device = device

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        pixels = media.pixels.to(self._device, torch.float32)
        return shrunk(pixels.flatten(0, -4), self._config.size).reshape(len(media), -1)

    def fingerprint(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return digest_of("pixels", str(self._config.size))
