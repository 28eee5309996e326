"""The ``guest_brightness`` reward."""

from collections.abc import Sequence

import pydantic
import torch

from branchtree.plugins import Condition, Media, Scores


class BrightnessConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``target`` is the brightness that scores best."""

    target: float = pydantic.Field(default=1.0, ge=0, le=1)


class Brightness:
    """Scores an image by how near its mean brightness is to the target: 0 at best, else below."""

    modalities = frozenset({"image"})

    def __init__(self, config: BrightnessConfig) -> None:
        self.config = config

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score image i; an image that is not finite is not valid. Raises ValueError for anything but B images."""
        if media.images is None or len(media) != len(conditions):
            raise ValueError(f"{len(conditions)} images were asked for, not {len(media)} {media.modality}s")
        brightness = media.pixels.flatten(1).mean(dim=1)
        return Scores(values=-(brightness - self.config.target).abs(), valid=brightness.isfinite())
