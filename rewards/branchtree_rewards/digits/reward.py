"""The `digits` reward: does an image, or the last frame of a video, show the handwritten digit that its prompt names?

Two small classifiers of images come with the package, and two of video frames. Those of a pair were trained on disjoint
halves of the same handwritten digits, so one can be optimised (`classifier="reward"`) while the other checks the result
(`classifier="heldout"`).
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import pydantic
import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media, RewardCard, RewardFootprint
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.digits.classifier import ClassifierName, DigitClassifier, load_classifier, to_network_input
from branchtree_rewards.shared.samples import check_batch, find_flaws, score_rest, unreadable

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


class Digits:
    """Scores how well each image, or each video's last frame, shows the handwritten digit that its prompt names."""

    modalities: frozenset[str] = frozenset({"image", "video"})
    reads_prompt = True

    def __init__(self, config: DigitsConfig) -> None:
        self._config = config
        self._networks: dict[str, DigitClassifier] = {}

    def footprint(self) -> RewardFootprint:
        """No weights to speak of."""
        return RewardFootprint(0)

    def load(self, device: torch.device) -> None:
        """Put the classifiers of images and of video frames on `device`; call once before `score`."""
        name = self._config.classifier
        moving: ClassifierName = "moving_reward" if name == "reward" else "moving_heldout"
        self._networks = {"image": load_classifier(name, device), "video": load_classifier(moving, device)}

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score image i, or the last frame of video i, against the digit named by the prompt of condition i.

        Args:
            media: Its `images` (B, C, H, W), or `videos` (B, F, C, H, W), are float in [0, 1], of any size; several
                channels are averaged. A digit is expected to fill an image, and half the height of a video.
            conditions: B conditions.

        Returns:
            `values` float32 (B,) and `valid` bool (B,), on the classifier's device. An item whose prompt does not name
            exactly one digit, or whose image is not finite, is not valid; its value means nothing.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: the media are not of these shapes, or there are not B conditions.
        """
        if not self._networks:
            raise RuntimeError("the digits reward was not loaded: call load(device) before score(...)")
        check_batch(media, conditions, self.modalities)
        network = self._networks[media.modality]
        frames = media.pixels if media.modality == "image" else media.pixels[:, -1:].squeeze(1)
        images = Media(images=frames.to(network.head.weight.device))
        flaws = find_flaws(images, conditions, prompt_flaw=_names_no_digit)
        return score_rest(images, conditions, flaws, lambda good, theirs: self._judge(network, good.pixels, theirs))

    def _judge(self, network: DigitClassifier, images: Tensor, conditions: Sequence[Condition]) -> Scores:
        target = torch.tensor([named_digit(condition.prompt) for condition in conditions], device=images.device)
        log_probs = torch.log_softmax(network(to_network_input(images)), dim=-1)
        if self._config.measure == "accuracy":
            values = (log_probs.argmax(dim=-1) == target).to(torch.float32)
        else:
            values = log_probs.gather(1, target[:, None]).squeeze(1)
        return Scores(values=values, valid=log_probs.isfinite().all(dim=-1))


def _names_no_digit(prompt: str) -> str | None:
    return "the prompt does not name exactly one digit" if named_digit(prompt) is None else unreadable(prompt)


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `digits` reward to the registry."""
    register(
        "digits",
        build=Digits,
        config=DigitsConfig,
        summary="Log-probability or accuracy of the prompted handwritten digit, by a bundled classifier.",
        card=RewardCard(
            modalities=Digits.modalities,
            checkpoint="bundled",
            size=0,
            licence="Apache-2.0",
            non_commercial=False,
            source="trained for this project on the digits of scikit-learn",
        ),
    )
