"""The `clip` reward: the cosine of an image and its prompt under a published CLIP.

`openai-b32` and `openai-l14` are OpenAI's models (arXiv 2103.00020) as published for transformers, with transformers'
rules for pictures and prompts. `dfn5b` is Apple's DFN5B ViT-H-14 at 378 pixels (arXiv 2309.17425), with open_clip's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from PIL import Image

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.network import (
    CONFIG_FILE,
    VIT_H_14_378,
    clip_size,
    clip_skeleton,
    cosine,
    load_clip,
    load_open_clip,
    read_config,
)
from branchtree_rewards.clip.text import CLIP_TOKENIZER, OPEN_CLIP_TOKENIZER, as_open_clip, check_end, cleaned
from branchtree_rewards.shared.footprints import Skeleton, skeleton
from branchtree_rewards.shared.pixels import clip_pixels, from_pil, normalised, to_pil
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_weights
from branchtree_rewards.shared.weights import read_state_dict
from branchtree_rewards.small.clip import write_clip_folder, write_open_clip

HUB = {
    "openai-b32": "openai/clip-vit-base-patch32",
    "openai-l14": "openai/clip-vit-large-patch14",
    "dfn5b": "apple/DFN5B-CLIP-ViT-H-14-378",
}
SIZES = {"vit_b_32": "openai-b32", "vit_l_14": "openai-l14"}
DFN5B_FILE = "open_clip_pytorch_model.bin"


class ClipConfig(ModelRewardConfig, frozen=True):
    """Settings of the `clip` reward, further to those of every reward with published weights.

    Attributes:
        path: A hub id, a folder, a weights file (of dfn5b alone), or "random:small"; by default the variant's hub id.
        variant: Which model, with its own rules for pictures and prompts: "openai-b32", "openai-l14" or "dfn5b".
        tokenizer: Hub id or folder of the CLIP tokenizer; by default the one that comes with the weights.
    """

    path: PathOrName = ""
    variant: Literal["openai-b32", "openai-l14", "dfn5b"] = "openai-b32"
    tokenizer: PathOrName | None = None


class ClipScore(ModelReward[ClipConfig]):
    """Scores how well images fit their prompts, by the cosine of CLIP's features."""

    name = "clip"

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self._path = config.path or HUB[config.variant]
        self._by_open_clip = config.variant == "dfn5b"

    def _open(self) -> Opened:
        opened = self._open_dfn5b() if self._by_open_clip else self._open_openai()
        network: Any = opened.network
        check_end(self._tokenizer, network.config.text_config, self._path)
        return opened

    def _open_openai(self) -> Opened:
        source = locate_weights(self._path, self._config.revision, partial(write_clip_folder, seed=0))
        network, file = load_clip(source)
        variant = self._config.variant
        if (found := SIZES.get(clip_size(network.config) or "", variant)) != variant:
            raise RewardError(f"'{self._path}' is {found} by its sizes, and variant is {variant}; set variant: {found}")
        self._tokenizer = CLIP_TOKENIZER.choose(source, self._config.tokenizer, source.location)
        return Opened(network, {file.name: file})

    def _open_dfn5b(self) -> Opened:
        small = partial(write_open_clip, weights=DFN5B_FILE, key=None, quick_gelu=True, seed=0)
        source = locate_weights(self._path, self._config.revision, small)
        file = source.find(DFN5B_FILE)
        described = source.maybe(CONFIG_FILE)
        architecture = read_config(described) if described else VIT_H_14_378
        if not architecture.quick_gelu:
            raise RewardError(f"'{described}' is another CLIP's: it does not set quick_gelu, as DFN5B's does")
        network = load_open_clip(read_state_dict(file), architecture, str(file))
        self._tokenizer = as_open_clip(CLIP_TOKENIZER.choose(source, self._config.tokenizer, OPEN_CLIP_TOKENIZER))
        return Opened(network, {DFN5B_FILE: file}, (described,) if described else ())

    def _skeleton(self) -> Skeleton:
        revision, variant = self._config.revision, self._config.variant
        if self._by_open_clip:
            return clip_skeleton(self._path, revision, VIT_H_14_378)
        return skeleton(self._path, revision, HUB[variant])

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        size = network.config.vision_config.image_size
        prompts = [condition.prompt for condition in conditions]
        if not self._by_open_clip:
            return Measured(cosine(network, self._tokenizer, clip_pixels(media.pixels, size, floor=True), prompts))
        pictures = from_pil([squash(picture, size) for picture in to_pil(media.pixels)])
        shown = normalised(pictures.to(media.pixels.device))
        return Measured(cosine(network, self._tokenizer, shown, [cleaned(prompt) for prompt in prompts]))


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resize to ``size`` x ``size`` with PIL's bicubic, whatever the shape: DFN5B's own rule in open_clip."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


register_rewards = reward_hook((ClipScore, ClipConfig))
