"""The feature space `clip`: projected image features of OpenAI's CLIP (arXiv 2103.00020), 512 of ViT-B/32."""

from __future__ import annotations

from functools import partial

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree.files.checksums import file_sha256
from branchtree.files.paths import PathOrName
from branchtree_rewards.clip.cosine import image_features
from branchtree_rewards.clip.folder import load_clip
from branchtree_rewards.features.frames import NetworkFeatures, digest_of
from branchtree_rewards.shared.pixels import from_pil, normalised, shortest_side_crop, to_pil
from branchtree_rewards.shared.source import locate_weights
from branchtree_rewards.small.clip import write_clip_folder


class ClipFeaturesConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the feature space `clip`.

    Attributes:
        path: A hub id or folder of a transformers CLIPModel, or "random:small" for a tiny random one.
        revision: Branch, tag or commit of the hub id.
        normalize: Whether features are scaled to length 1. Figures of the two differ by orders of magnitude.
        batch: Images sent through the network at a time.
        frames: Frames that a video's features are averaged over.
    """

    path: PathOrName = "openai/clip-vit-base-patch32"
    revision: str | None = None
    normalize: bool = False
    batch: int = pydantic.Field(default=32, ge=1, le=10_000)
    frames: int = pydantic.Field(default=8, ge=1, le=10_000)


class ClipFeatures(NetworkFeatures[ClipFeaturesConfig]):
    """Projected image features of a CLIP, of pictures prepared as transformers does."""

    name = "clip"

    @property
    def backend(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        length = "scaled to length 1" if self._config.normalize else "raw"
        return (
            f"CLIP image features of {self._config.path} (sha256 {self._digest[:12]}), {length}, resized by PIL bicubic"
        )

    def load(self, device: torch.device) -> None:
        """Load the network in float32. Raises RewardError if files are missing or do not fit."""
        source = locate_weights(self._config.path, self._config.revision, partial(write_clip_folder, seed=0))
        network, file = load_clip(source)
        self._network = network.eval().requires_grad_(False).to(device)
        self._device, self._digest = device, file_sha256(file)

    def fingerprint(self) -> str:
        """See branchtree.studies.diversity.spaces.FeatureSpace."""
        return digest_of("clip", self._digest, self._config.model_dump_json(include={"normalize", "frames"}))

    def _measure(self, images: Tensor) -> Tensor:
        size = self._network.config.vision_config.image_size
        pictures = [shortest_side_crop(picture, size, floor=True) for picture in to_pil(images)]
        found = image_features(self._network, normalised(from_pil(pictures).to(self._device)))
        return F.normalize(found, dim=-1) if self._config.normalize else found
