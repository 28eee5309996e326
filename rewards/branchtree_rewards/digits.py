"""The `digits` reward: does an image, or the last frame of a video, show the handwritten digit that its prompt names?

Two small classifiers of images come with the package, and two of video frames. Those of a pair were trained on disjoint
halves of the same handwritten digits, so one can be optimised (`classifier="reward"`) while the other checks the result
(`classifier="heldout"`).
"""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

import pydantic
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import unreadable

ClassifierName = Literal["reward", "heldout", "moving_reward", "moving_heldout"]
"""Two for images that a digit fills, and two for video frames in which a digit of half their size lies anywhere."""

CLASSES = 10
IMAGE_SIZE = 32


def weights_name(classifier: ClassifierName) -> str:
    """Return the file name, inside the package's `assets` folder, of a classifier's weights."""
    return f"digits_{classifier}.safetensors"


def to_network_input(images: Tensor) -> Tensor:
    """Turn images (B, C, H, W) in [0, 1] of any size into what `DigitClassifier` reads, float32 (B, 1, 32, 32).

    Channels are averaged, and the mean is resized with antialiased bilinear filtering.
    """
    grey = images.to(torch.float32).mean(dim=1, keepdim=True)
    if grey.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return grey
    return F.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=True)


class DigitClassifier(nn.Module):
    """A convolutional network that tells the ten handwritten digits apart.

    `forward` maps float32 images (B, 1, 32, 32) in [0, 1] to logits (B, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64 * 4 * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, 10) of images (B, 1, 32, 32)."""
        logits: Tensor = self.head(self.dropout(self.features(images).flatten(1)))
        return logits


def read_classifier(classifier: ClassifierName) -> bytes:
    """Return the file of a bundled classifier's weights. Raises FileNotFoundError without the package's assets."""
    return files("branchtree_rewards").joinpath("assets", weights_name(classifier)).read_bytes()


def load_classifier(classifier: ClassifierName, device: torch.device) -> DigitClassifier:
    """Return a bundled classifier in evaluation mode on ``device``, its parameters frozen."""
    weights = safetensors.torch.load(read_classifier(classifier))
    with torch.device("meta"):  # without drawing first weights, which would move torch's global random state
        network = DigitClassifier()
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval().to(device)


def classifier_pair(judge: Literal["reward", "heldout"]) -> dict[str, ClassifierName]:
    """Return the classifiers of images and of video frames that one half of the digits trained, by modality."""
    return {"image": judge, "video": "moving_reward" if judge == "reward" else "moving_heldout"}


DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def named_digit(prompt: str) -> int | None:
    """Return the digit that a prompt names, or None unless it names exactly one.

    A digit is named by its English word or by its numeral, in any letter case; naming the same digit twice
    ("the digit 7, seven") is naming one. A longer number such as "42" is not a digit, and makes the prompt ambiguous.
    """
    tokens = re.findall(r"[^\W\d_]+|\d+", prompt.lower())
    numerals = [token for token in tokens if token.isdecimal()]
    if any(len(numeral) > 1 for numeral in numerals):
        return None
    named = {int(numeral) for numeral in numerals}
    named |= {DIGIT_WORDS.index(token) for token in tokens if token in DIGIT_WORDS}
    return named.pop() if len(named) == 1 else None


class DigitsConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the `digits` reward.

    Attributes:
        classifier: Which classifier judges: "reward" to train against, "heldout" to check with.
        measure: "log_prob" scores the log-probability of the prompted digit (at most 0); "accuracy" scores 1 where
            the prompted digit is the most probable one and 0 elsewhere.
    """

    classifier: Literal["reward", "heldout"] = "reward"
    measure: Literal["log_prob", "accuracy"] = "log_prob"


class Digits(Reward[DigitsConfig]):
    """Scores how well each image, or each video's last frame, shows the handwritten digit that its prompt names.

    A digit is expected to fill an image, and half the height of a video; several channels are averaged.
    """

    name = "digits"
    modalities = frozenset({"image", "video"})

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self._networks: dict[str, DigitClassifier] = {}

    def load(self, device: torch.device) -> None:
        """Put the classifiers of images and of video frames on ``device``; call once before `score`."""
        pair = classifier_pair(self._config.classifier)
        self._networks = {modality: load_classifier(name, device) for modality, name in pair.items()}
        super().load(device)

    def _seen(self, media: Media) -> Media:
        return super()._seen(media if media.modality == "image" else Media(videos=media.pixels[:, -1:]))

    def _prompt_flaw(self, prompt: str) -> str | None:
        return "the prompt does not name exactly one digit" if named_digit(prompt) is None else unreadable(prompt)

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        images = media.pixels if media.modality == "image" else media.pixels[:, 0]
        target = torch.tensor([named_digit(condition.prompt) for condition in conditions], device=images.device)
        log_probs = torch.log_softmax(self._networks[media.modality](to_network_input(images)), dim=-1)
        if self._config.measure == "accuracy":
            values = (log_probs.argmax(dim=-1) == target).to(torch.float32)
        else:
            values = log_probs.gather(1, target[:, None]).squeeze(1)
        return Scores(values=values, valid=log_probs.isfinite().all(dim=-1))


register_rewards = reward_hook((Digits, DigitsConfig))
