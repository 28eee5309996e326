"""The cosine of CLIP features. Axis letters: B samples, C channels, H height, W width, T tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional


def cosine(network: Any, images: Tensor, ids: Tensor) -> Tensor:
    """The cosine (B,) of image i with text i, without logit scale; in float32 whatever the network's type.

    Args:
        network: A transformers CLIPModel.
        images: Preprocessed (B, C, H, W), on its device.
        ids: Token ids (B, T), on its device.
    """
    pictures, texts = image_features(network, images), text_features(network, ids)
    return (functional.normalize(pictures, dim=-1) * functional.normalize(texts, dim=-1)).sum(dim=-1)


def image_features(network: Any, images: Tensor) -> Tensor:
    """Projected image features, float32, of preprocessed images (B, C, H, W)."""
    return _projected(network.get_image_features(images))


def text_features(network: Any, ids: Tensor) -> Tensor:
    """Projected text features, float32, of token ids (B, T)."""
    return _projected(network.get_text_features(ids))


def _projected(output: Any) -> Tensor:
    """Transformers 4 returns the features themselves, and 5 an output that holds them as its pooled part."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()
