"""What the feature spaces share: frames, batches and digests. Axis letters: B samples, F frames, D features."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from branchtree.plugins import Media


class FrameConfig(Protocol):
    """What the settings of such a space have."""

    @property
    def batch(self) -> int:
        """Images sent through the network at a time."""

    @property
    def frames(self) -> int:
        """Frames that a video's features are averaged over."""


Config = TypeVar("Config", bound=FrameConfig)


class NetworkFeatures(ABC, Generic[Config]):
    """A feature space of pictures under one network; of a video, the mean over some frames."""

    modalities: frozenset[str] = frozenset({"image", "video"})
    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self._config = config
        self._network: Any = None  # once it is loaded
        self._device = torch.device("cpu")
        self._digest = ""  # of the weights' file

    @torch.no_grad()
    def features(self, media: Media) -> Tensor:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        if self._network is None:
            raise RuntimeError(f"the {self.name} features were not loaded: call load(device) first")
        return averaged_features(media, self._config.frames, self._config.batch, self._measure)

    @abstractmethod
    def _measure(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W) in [0, 1]."""


def averaged_features(media: Media, frames: int, batch: int, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Features (B, D) float32 of images, or of videos the mean over at most ``frames`` evenly spaced frames of each.

    ``measure`` maps at most ``batch`` images (N, C, H, W) in [0, 1] to features (N, D).
    """
    pixels = media.pixels if media.modality == "video" else media.pixels.unsqueeze(1)
    kept = torch.linspace(0, pixels.shape[1] - 1, min(frames, pixels.shape[1])).round().long()
    flat = pixels[:, kept.to(pixels.device)].flatten(0, 1)
    found = torch.cat([measure(part).float() for part in flat.split(batch)])
    return found.reshape(len(media), len(kept), -1).mean(dim=1)


def digest_of(*parts: str) -> str:
    """One digest of several texts, in hexadecimal."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
