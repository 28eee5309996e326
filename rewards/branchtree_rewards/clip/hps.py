"""The `hps` reward: Human Preference Score v2 (arXiv 2306.09341), a CLIP ViT-H-14 tuned on people's choices.

The score is the cosine of an image's feature with its prompt's, without the logit scale; the publisher's benchmark
tables show 100 times that. Scores of v2.0 and v2.1 are not comparable. Source: the HPSv2 repository.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.clip.network import CONFIG_FILE, VIT_H_14, clip_skeleton, cosine, load_open_clip, read_config
from branchtree_rewards.clip.text import CLIP_TOKENIZER, OPEN_CLIP_TOKENIZER, as_open_clip, check_end, cleaned
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.pixels import normalised, to_rgb, to_uint8
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_weights, refuse_file
from branchtree_rewards.shared.weights import read_weights, state_dict
from branchtree_rewards.small.clip import write_open_clip

OTHERS = {"v2.1": r"v2(?![._-]?1)(?:[._-]?0)?", "v2.0": r"v2[._-]?1"}  # in names of the other version's files
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}


class HpsConfig(ModelRewardConfig, frozen=True):
    """Settings of the `hps` reward, further to those of every reward with published weights.

    Attributes:
        path: A hub id, a folder, a weights file, or "random:small". A local `open_clip_config.json` beside the weights
            tells their architecture; without it, it is ViT-H-14.
        version: Which checkpoint: "v2.1", or the earlier "v2.0". Their scores are not comparable.
        tokenizer: Hub id or folder of the CLIP tokenizer; by default the one beside local weights, or else that of the
            model HPS was tuned from.
    """

    path: PathOrName = "xswu/HPSv2"
    version: Literal["v2.1", "v2.0"] = "v2.1"
    tokenizer: PathOrName | None = None


class Hps(ModelReward[HpsConfig]):
    """Scores how well images please, and fit their prompts, by the cosine of HPS-v2's CLIP features."""

    name = "hps"

    def _open(self) -> Opened:
        version = self._config.version
        name = FILES[version]
        small = partial(write_open_clip, weights=name, key="state_dict", quick_gelu=False, seed=0)
        source = locate_weights(self._config.path, self._config.revision, small)
        refuse_file(source, OTHERS[version], f"hps is to be {version}; set version, or give the file '{name}'")
        file = source.find(name)
        content = read_weights(file)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise RewardError(f"'{file}' is no HPS checkpoint: it has no entry 'state_dict'")
        # The hub's repository has no such file, and asking for it would need the network at every start.
        described = source.maybe(CONFIG_FILE) if source.folder else None
        architecture = read_config(described) if described else VIT_H_14
        network = load_open_clip(state_dict(content["state_dict"], file), architecture, str(file))
        tokenizer = CLIP_TOKENIZER.choose(source, self._config.tokenizer, OPEN_CLIP_TOKENIZER)
        check_end(tokenizer, network.config.text_config, str(file))
        self._tokenizer = as_open_clip(tokenizer)
        return Opened(network, {name: file}, (described,) if described else ())

    def _skeleton(self) -> Skeleton:
        return clip_skeleton(self._config.path, self._config.revision, VIT_H_14)

    def _measure(self, network: Any, media: Media, conditions: Sequence[Condition]) -> Measured:
        images = to_uint8(to_rgb(media.pixels)).float() / 255
        pictures = normalised(letterbox(images, network.config.vision_config.image_size))
        prompts = [cleaned(condition.prompt) for condition in conditions]
        return Measured(cosine(network, self._tokenizer, pictures, prompts))


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize images (B, 3, H, W) to ``size`` on the longer side, and put them on a black square (B, 3, size, size).

    The publisher resizes float pixels, with torchvision's bicubic and antialiasing and without clamping; this is the
    same to the bit on the CPU. Images whose longer side is ``size`` already are padded too, where the publisher's code
    does not and fails.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        # Python's rounding, as the publisher's. A side of less than half a pixel, which fails there, becomes one.
        sides = [max(1, round(side * scale)) for side in (height, width)]
        images = functional.interpolate(images, sides, mode="bicubic", align_corners=False, antialias=True)
    down, right = size - images.shape[-2], size - images.shape[-1]
    return functional.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


register_rewards = reward_hook((Hps, HpsConfig))
