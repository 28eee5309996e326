"""The ``guest_gaussian`` model: images of a prompt are Gaussian around a mean that depends on the prompt's words."""

import math
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pydantic
import torch
from torch import Tensor, nn

from branchtree.plugins import Condition, Conditioning, Media, ModelBase

WORDS = 16  # buckets that the words of a prompt are hashed into


class GuestGaussianConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``path`` is a folder that a run exported, or none for fresh weights; ``spread`` the images' deviation."""

    path: Path | None = None
    spread: float = pydantic.Field(default=0.5, gt=0)


class GuestGaussian(ModelBase):
    """The exact flow from noise to N(mean(words), spread^2 I); its latents are RGB images of 4x4 pixels."""

    modality = "image"
    latent_shape = (3, 4, 4)

    def build_denoiser(self) -> nn.Module:
        """The mean of each bucket's words, 0 at first."""
        mean = nn.Linear(WORDS, math.prod(self.latent_shape))
        nn.init.zeros_(mean.weight)
        nn.init.zeros_(mean.bias)
        return nn.Sequential(OrderedDict(mean=mean))

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """How often each bucket's words occur, (P, WORDS)."""
        buckets = [[zlib.crc32(word.encode()) % WORDS for word in each.prompt.lower().split()] for each in conditions]
        return {"words": torch.stack([torch.bincount(torch.tensor(row), minlength=WORDS).float() for row in buckets])}

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """E[noise - image | latents] of latents (B, *latent) = (1 - sigma) image + sigma noise."""
        denoiser, level = denoiser or self.denoiser, sigma.view(-1, 1, 1, 1)
        mean = denoiser(conditioning["words"].to(next(denoiser.parameters()).dtype)).view_as(latents)
        variance = ((1 - level) * self.config.spread) ** 2 + level**2
        residual = (latents - (1 - level) * mean) / variance
        return ((level - (1 - level) * self.config.spread**2) * residual - mean).float()

    def decode(self, latents: Tensor) -> Media:
        """Latents as images: 0 is grey."""
        return Media(images=(latents.float() / 4 + 0.5).clamp(0, 1))
