"""What the feature spaces share: frames, batches and digests. Axis letters: B samples, F frames, D features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from branchtree.protocols import Media


def averaged_features(media: Media, frames: int, batch: int, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Features (B, D) float32 of images, or of videos the mean over at most ``frames`` evenly spaced frames of each.

    ``measure`` maps at most ``batch`` images (N, C, H, W) in [0, 1] to features (N, D).
    """
    pixels = media.pixels if media.modality == "video" else media.pixels.unsqueeze(1)
    kept = torch.linspace(0, pixels.shape[1] - 1, min(frames, pixels.shape[1])).round().long()
    flat = pixels[:, kept.to(pixels.device)].flatten(0, 1)
    found = torch.cat([measure(part).float() for part in flat.split(batch)])
    return found.reshape(len(media), len(kept), -1).mean(dim=1)


def digest(*parts: str) -> str:
    """One digest of several texts, in hexadecimal."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
