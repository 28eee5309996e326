"""The `hpsv3` reward: Human Preference Score v3 (arXiv 2508.03789), how people would like a picture of a prompt.

HPSv3 is Qwen2-VL-7B with a small network of three linear layers, which reads the state at one special token and gives
two numbers: the mean of a picture's score, which is the reward, and the logarithm of its standard deviation. Sources:
the repository MizzenAI/HPSv3 (`inference.py`, `train.py`, `qwen2vl_trainer.py`, `HPSv3_7B.yaml`) and the hub's.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
from PIL import Image
from torch import nn

from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.hpsv3.network import QUESTION, WEIGHTS, Hpsv3Network, hpsv3_weights, load_head
from branchtree_rewards.qwen2vl.backbone import (
    backbone_skeleton,
    locate_base,
    precision,
    read_architecture,
    round_frequencies,
)
from branchtree_rewards.qwen2vl.patches import PAIR, UNIT, Patches, cut_up, fitted_size
from branchtree_rewards.qwen2vl.questions import Questions, open_tokenizer
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.pixels import from_pil, normalised, to_pil
from branchtree_rewards.shared.reward import Measured, ModelReward, ModelRewardConfig, Opened, reward_hook
from branchtree_rewards.shared.source import locate_weights, refuse_file
from branchtree_rewards.shared.weights import build_pretrained, read_state_dict
from branchtree_rewards.small.hpsv3 import write_small_hpsv3

HUB_ID = "MizzenAI/HPSv3"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
AREA = 256 * UNIT * UNIT  # pixels of a picture after the resize, the least and the most
OTHERS = r"v2|v3[._-]?(?:\+\+|plus)"  # in names of files of other versions


class Hpsv3Config(ModelRewardConfig, frozen=True):
    """Settings of the `hpsv3` reward.

    Attributes:
        path: A hub id, a folder that holds `HPSv3.safetensors`, that file, or "random:small". A local folder may bring
            its own `config.json` and tokenizer.
        base: The model that was fine-tuned, a hub id or a folder. Its `config.json` and its tokenizer alone are read.
        dtype: Precision of the backbone, "bfloat16" or "float32". "auto" is bfloat16, as the publisher runs it, and
            float32 on a CPU. The head is in float32 always, and the frequencies of rotary embeddings are rounded to
            bfloat16 always, as those that the model was trained with.
        batch: Pictures sent through the model at a time.
    """

    path: PathOrName = HUB_ID
    base: PathOrName = BASE
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    batch: int = pydantic.Field(default=4, ge=1, le=10_000)


class Hpsv3(ModelReward[Hpsv3Config]):
    """Scores how people would like each picture of its prompt; about 10 for those of FLUX.1-dev."""

    name = "hpsv3"
    _dtype: torch.dtype
    _questions: Questions

    def load(self, device: torch.device) -> None:
        """Load the model and put it on ``device``; see `ModelReward.load`. Raises RewardError."""
        self._dtype = precision(self._config.dtype, device)
        super().load(device)

    def _open(self) -> Opened:
        from transformers import Qwen2VLModel

        config = self._config
        source = locate_weights(config.path, config.revision, write_small_hpsv3)
        refuse_file(source, OTHERS, f"hpsv3 reads HPS v3; give the file '{WEIGHTS}'")
        base = locate_base(config.base, write_small_hpsv3)
        file = source.find(WEIGHTS)
        weights = hpsv3_weights(read_state_dict(file), self._dtype, str(file))
        architecture = read_architecture(source, base, weights.vocabulary)
        # The hub's repository has no tokenizer, and asking for one would need the network at every start.
        tokenizer = open_tokenizer(source if source.folder else None, "", base, QUESTION)
        self._questions = Questions(QUESTION, tokenizer, architecture)
        backbone = build_pretrained(Qwen2VLModel, architecture, weights.backbone, str(file), self._dtype)
        round_frequencies(backbone)
        head = load_head(architecture.text_config.hidden_size, weights.head, str(file))
        return Opened(Hpsv3Network(backbone, head, self._questions.reward_ids), {WEIGHTS: file})

    def fingerprint(self) -> str:
        """Return a digest of the weights and of all settings that change a score, the precision on this device too."""
        return hashlib.sha256(f"{super().fingerprint()} {self._dtype}".encode()).hexdigest()

    def _skeleton(self) -> Skeleton:
        config = self._config
        return backbone_skeleton(config.path, config.base, BASE, config.dtype)

    def _prompt_flaw(self, prompt: str) -> str | None:
        return super()._prompt_flaw(prompt) or self._questions.flaw(prompt)

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        device = media.pixels.device
        looks = [look(picture, device) for picture in to_pil(media.pixels)]
        pairs = zip(conditions, looks, strict=True)
        rows = [self._questions.encode(condition.prompt, seen.tokens) for condition, seen in pairs]
        outputs = network(*self._questions.batch(rows, device), looks)
        return Measured(outputs[:, 0], {"sigma": outputs[:, 1].exp()})


def look(picture: Image.Image, device: torch.device) -> Patches:
    """Return what the model sees of a picture: resized by PIL's bicubic to the area of about 448 x 448 pixels."""
    height, width = fitted_size(picture.height, picture.width, AREA, AREA)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return cut_up(normalised(from_pil([resized]).to(device)).repeat(PAIR, 1, 1, 1))


register_rewards = reward_hook((Hpsv3, Hpsv3Config))
