"""The `aesthetic` reward: LAION's aesthetic predictor, how beautiful a picture is, whatever its prompt.

    raw = w . f / |f| + b        f: the projected image features of OpenAI's CLIP ViT-L/14

The linear head, w and b, is sa_0_4_vit_l_14_linear.pth of https://github.com/LAION-AI/aesthetic-predictor. It is
not on the hub, so it must be downloaded by hand. It was fitted to ratings from 0 to 10; nothing holds it to that range.

Pictures are resized and cut with PIL, as by the publisher. VBench, which uses the same head for the frames of videos,
resizes float tensors without antialiasing and divides by 10: its figures are not comparable.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.files.reading import user_path
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.network import clip_size, load_clip
from branchtree_rewards.shared.footprints import Skeleton, skeleton
from branchtree_rewards.shared.pixels import clip_pixels
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_local, locate_weights
from branchtree_rewards.shared.weights import load_strictly, read_state_dict
from branchtree_rewards.small.clip import AESTHETIC_SEED, CLIP, HEAD, write_clip_folder, write_small_aesthetic

HUB_CLIP = "openai/clip-vit-large-patch14"
HEAD_SOURCE = "https://github.com/LAION-AI/aesthetic-predictor"


class AestheticConfig(ModelRewardConfig, frozen=True):
    """Settings of the `aesthetic` reward, further to those of every reward with published weights.

    Attributes:
        path: The linear head: its file, sa_0_4_vit_l_14_linear.pth, or the folder that holds it. It is published at
            https://github.com/LAION-AI/aesthetic-predictor and not on the hub. Or "random:small".
        clip: Hub id or folder of the CLIP whose features the head reads. By default the folder "clip" beside the head,
            if there is one, and otherwise "openai/clip-vit-large-patch14".
        revision: Branch, tag or commit of the CLIP's hub id.
    """

    path: PathOrName = HEAD
    clip: PathOrName | None = None


class AestheticPredictor(nn.Module):
    """CLIP's vision encoder and projection, and a linear head on the normalised features."""

    def __init__(self, clip: Any, head: nn.Linear) -> None:
        super().__init__()
        self.vision, self.projection, self.head = clip.vision_model, clip.visual_projection, head
        self.image_size = int(clip.config.vision_config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Rate preprocessed images (B, 3, S, S): (B,)."""
        features = self.projection(self.vision(pixel_values=images).pooler_output)
        rated: Tensor = self.head(functional.normalize(features.float(), dim=-1))
        return rated.squeeze(1)


class Aesthetic(ModelReward[AestheticConfig]):
    """Rates how beautiful each picture is, about 0 to 10, whatever its prompt."""

    name = "aesthetic"
    reads_prompt = False

    def _open(self) -> Opened:
        return open_predictor(self._config)

    def _skeleton(self) -> Skeleton:
        config = self._config
        return skeleton(_clip_of(config), config.revision, HUB_CLIP).only("vision_model", "visual_projection")

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        predictor = cast(AestheticPredictor, network)
        return Measured(predictor(clip_pixels(media.pixels, predictor.image_size)))


def open_predictor(config: AestheticConfig) -> Opened:
    """Load the head and the CLIP that ``config`` names into an AestheticPredictor. Raises RewardError."""
    advice = f"the aesthetic head is not on the hub: download '{HEAD}' from {HEAD_SOURCE} and give its path"
    source = locate_local(config.path, None, write_small_aesthetic, advice)
    file = source.find(HEAD)
    write_small = partial(write_clip_folder, seed=AESTHETIC_SEED)
    clip_source = locate_weights(_clip_of(config, source.folder), config.revision, write_small)
    clip, clip_file = load_clip(clip_source)
    _check_pair(file, clip.config, clip_source.name)
    with torch.device("meta"):
        head = nn.Linear(clip.config.projection_dim, 1)
    load_strictly(head, read_state_dict(file), str(file))
    return Opened(AestheticPredictor(clip, head), {HEAD: file, f"{CLIP}/{clip_file.name}": clip_file})


def _clip_of(config: AestheticConfig, folder: Path | None = None) -> str:
    """Return the hub id or folder of the CLIP; ``folder`` holds the head, by default at ``config.path``."""
    beside = (folder or user_path(config.path)) / CLIP
    return config.clip or (str(beside) if beside.is_dir() else HUB_CLIP)


def _check_pair(head: Path, clip: Any, name: str) -> None:
    """Refuse a head that was fitted to another CLIP, whose features may have as many numbers. Raises RewardError."""
    fitted = re.search(r"vit_[bl]_\d+", head.name.lower())
    if clip.vision_config.hidden_act != "quick_gelu":
        raise RewardError(f"clip '{name}' is not OpenAI's, whose features the head was fitted to; give '{HUB_CLIP}'")
    if fitted and (found := clip_size(clip)) not in {None, fitted[0]}:
        raise RewardError(f"'{head}' was fitted to {fitted[0]}, and clip '{name}' is {found}; give one pair")


register_rewards = reward_hook((Aesthetic, AestheticConfig))
