"""The `pickscore` reward: PickScore v1 (arXiv 2305.01569), which of two pictures of a prompt people would pick.

    raw = exp(logit_scale) * cos(image features, text features)

The checkpoint is a CLIP ViT-H/14 fine-tuned by its publisher; the logit scale is read from it. Trainers use the score
on several scales, which `scale` names: div100 gives the figures of papers, div26 is flow_grpo's, and mix(18,8)
MixGRPO's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.network import cosine, load_clip
from branchtree_rewards.clip.text import CLIP_TOKENIZER, OPEN_CLIP_TOKENIZER, check_end
from branchtree_rewards.shared.footprints import Skeleton, skeleton
from branchtree_rewards.shared.pixels import clip_pixels
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_weights, refuse_name
from branchtree_rewards.small.clip import write_clip_folder

HUB_ID = "yuvalkirstain/PickScore_v1"
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

    name = "pickscore"

    def _open(self) -> Opened:
        source = locate_weights(self._config.path, self._config.revision, partial(write_clip_folder, seed=SEED))
        refuse_name(self._config.path, OTHERS, f"PickScore v1 was fine-tuned from it; give '{HUB_ID}', or its folder")
        network, file = load_clip(source)
        self._tokenizer = CLIP_TOKENIZER.choose(source, self._config.tokenizer, OPEN_CLIP_TOKENIZER)
        check_end(self._tokenizer, network.config.text_config, source.name)
        return Opened(network, {file.name: file})

    def _skeleton(self) -> Skeleton:
        return skeleton(self._config.path, self._config.revision, HUB_ID)

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        pictures = clip_pixels(media.pixels, network.config.vision_config.image_size, floor=True)
        prompts = [condition.prompt for condition in conditions]
        similarity = cosine(network, self._tokenizer, pictures, prompts)
        return Measured(network.logit_scale.float().exp() * similarity, {"cosine": similarity})


register_rewards = reward_hook((PickScore, PickScoreConfig))
