"""The `pickscore` reward: PickScore v1 (arXiv 2305.01569), which of two pictures of a prompt people would pick.

    raw = exp(logit_scale) * cos(image features, text features)

The checkpoint is a CLIP ViT-H/14 fine-tuned by its publisher; the logit scale is read from it. Trainers use the score
on several scales, to be had as `scale`: div100 gives the figures of papers, div26 is flow_grpo's, and
mix(18,8) MixGRPO's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media, RewardCard
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.clip.cosine import cosine
from branchtree_rewards.clip.folder import load_clip
from branchtree_rewards.clip.open_clip import VIT_H_14, clip_config
from branchtree_rewards.clip.text import check_end, load_own_tokenizer, token_ids
from branchtree_rewards.shared.footprints import Skeleton, build_clip, skeleton
from branchtree_rewards.shared.model_reward import Measured, ModelReward, ModelRewardConfig, Opened
from branchtree_rewards.shared.other_versions import refuse_name
from branchtree_rewards.shared.pixels import from_pil, normalised, shortest_side_crop, to_pil
from branchtree_rewards.shared.samples import unreadable_or_empty
from branchtree_rewards.shared.source import locate_weights
from branchtree_rewards.shared.tokenizers import own_token
from branchtree_rewards.small.clip import write_clip_folder

HUB_ID = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model card's processor
OTHERS = r"laion2b|laion-2b|dfn|metaclip|datacomp"  # in names of models of the same shapes
SEED = 20230502  # of the small random checkpoint


class PickScoreConfig(ModelRewardConfig, frozen=True):
    """Settings of the `pickscore` reward, further to those of every reward with published weights.

    Attributes:
        tokenizer: Hub id or folder of the CLIP tokenizer. By default the folder of the weights, if it holds one, and
            otherwise that of "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", which the model card names.
    """

    path: PathOrName = HUB_ID
    tokenizer: PathOrName | None = None


class PickScore(ModelReward[PickScoreConfig]):
    """Scores how readily people would pick each picture for its prompt; typically 18 to 24."""

    def __init__(self, config: PickScoreConfig) -> None:
        super().__init__(config)
        self._tokenizer: Any = None

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, partial(write_clip_folder, seed=SEED))
        refuse_name(self._config.path, OTHERS, f"PickScore v1 was fine-tuned from it; give '{HUB_ID}', or its folder")
        network, file = load_clip(source)
        self._tokenizer = load_own_tokenizer(source, self._config.tokenizer, TOKENIZER)
        check_end(self._tokenizer, network.config.text_config, source.name)
        return Opened(network, {file.name: file})

    def _skeleton(self) -> Skeleton:
        published = clip_config(VIT_H_14).to_dict()
        return skeleton(build_clip, self._config.path, self._config.revision, (HUB_ID, published))

    def _prompt_flaw(self, prompt: str) -> str | None:
        return unreadable_or_empty(prompt) or own_token(self._tokenizer, prompt)

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        config, device = network.config, media.pixels.device
        size = config.vision_config.image_size
        pictures = [shortest_side_crop(picture, size, floor=True) for picture in to_pil(media.pixels)]
        prompts = [condition.prompt for condition in conditions]
        ids = token_ids(self._tokenizer, prompts, config.text_config.max_position_embeddings)
        similarity = cosine(network, normalised(from_pil(pictures).to(device)), ids.to(device))
        return Measured(network.logit_scale.float().exp() * similarity, {"cosine": similarity})


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `pickscore` reward to the registry."""
    register(
        "pickscore",
        build=PickScore,
        config=PickScoreConfig,
        summary="PickScore v1: which picture of a prompt people would pick; 100 times a cosine, typically 18 to 24.",
        card=RewardCard(
            modalities=frozenset({"image"}),
            checkpoint="yuvalkirstain/PickScore_v1, model.safetensors or pytorch_model.bin",
            size=None,
            licence="MIT for the code; see the model card for the weights",
            non_commercial=False,
            source="https://github.com/yuvalkirstain/PickScore, arXiv 2305.01569",
        ),
    )
