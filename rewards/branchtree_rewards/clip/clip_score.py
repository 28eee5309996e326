"""The `clip` reward: the cosine of an image and its prompt under a published CLIP.

`openai-b32` and `openai-l14` are OpenAI's models (arXiv 2103.00020) as published for transformers, with transformers'
rules for pictures and prompts. `dfn5b` is Apple's DFN5B ViT-H-14 at 378 pixels (arXiv 2309.17425), with open_clip's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from PIL import Image
from torch import Tensor

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
from branchtree_rewards.shared.pixels import from_pil, normalised, shortest_side_crop, to_pil
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import WeightsSource, locate_weights
from branchtree_rewards.shared.weights import read_state_dict
from branchtree_rewards.small.clip import write_clip_folder, write_open_clip

HUB = {
    "openai-b32": "openai/clip-vit-base-patch32",
    "openai-l14": "openai/clip-vit-large-patch14",
    "dfn5b": "apple/DFN5B-CLIP-ViT-H-14-378",
}
SIZES = {"vit_b_32": "openai-b32", "vit_l_14": "openai-l14"}
DFN5B_FILE = "open_clip_pytorch_model.bin"


class ClipModelConfig(ModelRewardConfig, frozen=True):
    """Which CLIP a reward uses, further to the settings of every reward with published weights.

    Attributes:
        path: A hub id, a folder, a weights file (of dfn5b alone), or "random:small"; by default the variant's hub id.
        variant: Which model, with its own rules for pictures and prompts: "openai-b32", "openai-l14" or "dfn5b".
    """

    path: PathOrName = ""
    variant: Literal["openai-b32", "openai-l14", "dfn5b"] = "openai-b32"


class ClipConfig(ClipModelConfig, frozen=True):
    """Settings of the `clip` reward, further to those of every reward with published weights.

    Attributes:
        path: A hub id, a folder, a weights file (of dfn5b alone), or "random:small"; by default the variant's hub id.
        variant: Which model, with its own rules for pictures and prompts: "openai-b32", "openai-l14" or "dfn5b".
        tokenizer: Hub id or folder of the CLIP tokenizer; by default the one that comes with the weights.
    """

    tokenizer: PathOrName | None = None


AnyClipConfig = TypeVar("AnyClipConfig", bound="ClipModelConfig")


class ClipReward(ModelReward[AnyClipConfig]):
    """A reward by one of the published CLIPs, each with its own rule for pictures."""

    def __init__(self, config: AnyClipConfig) -> None:
        super().__init__(config)
        self._path = config.path or HUB[config.variant]
        self._by_open_clip = config.variant == "dfn5b"

    def _load(self) -> tuple[Opened, WeightsSource]:
        """Load the CLIP, and say where it is. Raises RewardError."""
        return self._load_dfn5b() if self._by_open_clip else self._load_openai()

    def _load_openai(self) -> tuple[Opened, WeightsSource]:
        source = locate_weights(self._path, self._config.revision, partial(write_clip_folder, seed=0))
        network, file = load_clip(source)
        variant = self._config.variant
        if (found := SIZES.get(clip_size(network.config) or "", variant)) != variant:
            raise RewardError(f"'{self._path}' is {found} by its sizes, and variant is {variant}; set variant: {found}")
        return Opened(network, {file.name: file}), source

    def _load_dfn5b(self) -> tuple[Opened, WeightsSource]:
        small = partial(write_open_clip, weights=DFN5B_FILE, key=None, quick_gelu=True, seed=0)
        source = locate_weights(self._path, self._config.revision, small)
        file = source.find(DFN5B_FILE)
        described = source.maybe(CONFIG_FILE)
        architecture = read_config(described) if described else VIT_H_14_378
        if not architecture.quick_gelu:
            raise RewardError(f"'{described}' is another CLIP's: it does not set quick_gelu, as DFN5B's does")
        network = load_open_clip(read_state_dict(file), architecture, str(file))
        return Opened(network, {DFN5B_FILE: file}, (described,) if described else ()), source

    def _skeleton(self) -> Skeleton:
        revision, variant = self._config.revision, self._config.variant
        if self._by_open_clip:
            return clip_skeleton(self._path, revision, VIT_H_14_378)
        return skeleton(self._path, revision, HUB[variant])

    def _shown(self, network: Any, pictures: Sequence[Image.Image]) -> Tensor:
        """Return pictures of any sizes as the network takes them (B, 3, S, S), on the device."""
        size = network.config.vision_config.image_size
        cut = [
            squash(picture, size) if self._by_open_clip else shortest_side_crop(picture, size, floor=True)
            for picture in pictures
        ]
        return normalised(from_pil(cut).to(self._device))


class ClipScore(ClipReward[ClipConfig]):
    """Scores how well images fit their prompts, by the cosine of CLIP's features."""

    name = "clip"

    def _open(self) -> Opened:
        opened, source = self._load()
        network: Any = opened.network
        otherwise = OPEN_CLIP_TOKENIZER if self._by_open_clip else source.location
        tokenizer = CLIP_TOKENIZER.choose(source, self._config.tokenizer, otherwise)
        self._tokenizer = as_open_clip(tokenizer) if self._by_open_clip else tokenizer
        check_end(self._tokenizer, network.config.text_config, self._path)
        return opened

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        prompts = [condition.prompt for condition in conditions]
        texts = [cleaned(prompt) for prompt in prompts] if self._by_open_clip else prompts
        return Measured(cosine(network, self._tokenizer, self._shown(network, to_pil(media.pixels)), texts))


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resize to ``size`` x ``size`` with PIL's bicubic, whatever the shape: DFN5B's own rule in open_clip."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


register_rewards = reward_hook((ClipScore, ClipConfig))
