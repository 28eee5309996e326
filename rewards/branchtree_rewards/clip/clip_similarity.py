"""The `clip_similarity` reward: the cosine of CLIP's features of a sample and of the image that it was made from.

How much of a picture an edit keeps: sim_image of InstructPix2Pix (arXiv 2211.09800), with OpenAI's L/14. CLIP-I of
MagicBrush (arXiv 2306.10012) is the same cosine, by B/32, with a target picture in place of the source: there is none
in training. InstructPix2Pix resizes float tensors to a square; pictures here are resized and cut with PIL, as for
`clip` and by MagicBrush. A video's figure is the mean over its frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.clip_score import ClipModelConfig, ClipReward
from branchtree_rewards.clip.network import image_features
from branchtree_rewards.shared.conditions import first_frames
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.reward import Measured, Opened, reward_hook
from branchtree_rewards.shared.samples import MAX_ASPECT, score_rest, spans

NO_IMAGE = "its condition has no image"


class ClipSimilarityConfig(ClipModelConfig, frozen=True):
    """Settings of the `clip_similarity` reward, further to those of every reward with published weights.

    Attributes:
        path: A hub id, a folder, a weights file (of dfn5b alone), or "random:small"; by default the variant's hub id.
        variant: Which model, with its own rule for pictures: "openai-b32", "openai-l14" or "dfn5b".
    """


class ClipSimilarity(ClipReward[ClipSimilarityConfig]):
    """Scores how much of its condition's first image a sample keeps, by the cosine of CLIP's image features."""

    name = "clip_similarity"
    modalities = frozenset({"image", "video"})
    reads_prompt = False

    def _open(self) -> Opened:
        opened, _ = self._load()
        del opened.network.text_model  # half of the weights, and prompts are not read
        return opened

    def _skeleton(self) -> Skeleton:
        return super()._skeleton().only("vision_model", "visual_projection")

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        images, reasons = first_frames(conditions)
        for row, image in enumerate(images):
            if row not in reasons and (flaw := _flaw(image)):
                reasons[row] = flaw
        return score_rest(media, conditions, reasons, super()._scores)

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        sources: dict[object, list[int]] = {}  # rows, by the files of their images
        for row, condition in enumerate(conditions):
            sources.setdefault((condition.image, condition.video), []).append(row)
        different, _ = first_frames([conditions[rows[0]] for rows in sources.values()])
        of_sources = self._features(network, [image for image in different if image is not None])
        wanted = torch.empty(len(conditions), of_sources.shape[1], device=of_sources.device)
        for feature, rows in zip(of_sources, sources.values(), strict=True):
            wanted[rows] = feature
        frames = media.pixels[:, None] if media.modality == "image" else media.pixels
        found = self._features(network, to_pil(frames.flatten(0, 1))).unflatten(0, frames.shape[:2])
        return Measured((found * wanted[:, None]).sum(dim=-1).mean(dim=1))

    def _features(self, network: Any, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features (N, E) of length 1, of ``batch`` pictures at a time."""
        rows = spans(len(pictures), self._config.batch)
        found = [image_features(network, self._shown(network, pictures[some])) for some in rows]
        return functional.normalize(torch.cat(found), dim=-1)


def _flaw(image: Image.Image | None) -> str | None:
    """Say why there is nothing to compare a sample with, if there is nothing."""
    if image is None:
        return NO_IMAGE
    if max(image.size) <= MAX_ASPECT * min(image.size):
        return None
    return f"its condition's image is too elongated: one side is more than {MAX_ASPECT} times the other"


register_rewards = reward_hook((ClipSimilarity, ClipSimilarityConfig))
