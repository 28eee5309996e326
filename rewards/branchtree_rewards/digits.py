"""The `digits` reward: does an image show the handwritten digit that its prompt names?

Two small classifiers come with the package. They were trained on disjoint halves of the same handwritten digits, so
one can be optimised (`classifier="reward"`) while the other checks the result (`classifier="heldout"`).
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import pydantic
import torch
from torch import Tensor

from branchtree.hookspecs import hookimpl
from branchtree.protocols import Condition, Media, Scores
from branchtree_rewards._digit_classifier import DigitClassifier, load_classifier, to_network_input

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
    """Scores how well each image shows the handwritten digit that its prompt names."""

    modalities: frozenset[str] = frozenset({"image"})

    def __init__(self, config: DigitsConfig) -> None:
        self._config = config
        self._network: DigitClassifier | None = None

    def load(self, device: torch.device) -> None:
        """Put the classifier on `device`; call once before `score`."""
        self._network = load_classifier(self._config.classifier, device)

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score image i against the digit named by the prompt of condition i.

        Args:
            media: Its `images` are float (B, C, H, W) in [0, 1], of any size; several channels are averaged.
            conditions: B conditions.

        Returns:
            `values` float32 (B,) and `valid` bool (B,), on the classifier's device. An item whose prompt does not name
            exactly one digit, or whose image is not finite, is not valid; its value means nothing.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: `media` holds no images, they are not (B, C, H, W), or there are not B conditions.
        """
        if self._network is None:
            raise RuntimeError("the digits reward was not loaded: call load(device) before score(...)")
        images = _checked_images(media, len(conditions)).to(self._network.head.weight.device)
        digits = [named_digit(condition.prompt) for condition in conditions]
        named = torch.tensor([digit is not None for digit in digits], dtype=torch.bool, device=images.device)
        target = torch.tensor([digit or 0 for digit in digits], dtype=torch.int64, device=images.device)
        log_probs = torch.log_softmax(self._network(to_network_input(images)), dim=-1)
        if self._config.measure == "accuracy":
            values = (log_probs.argmax(dim=-1) == target).to(torch.float32)
        else:
            values = log_probs.gather(1, target[:, None]).squeeze(1)
        return Scores(values=values, valid=named & log_probs.isfinite().all(dim=-1))


def _checked_images(media: Media, count: int) -> Tensor:
    if media.images is None:
        raise ValueError("the digits reward scores images, but the media hold none")
    if media.images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), not {tuple(media.images.shape)}")
    if len(media.images) != count:
        raise ValueError(f"{len(media.images)} images came with {count} conditions; each image needs its own")
    return media.images


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `digits` reward to the registry."""
    register(
        "digits",
        build=Digits,
        config=DigitsConfig,
        summary="Log-probability or accuracy of the prompted handwritten digit, by a bundled classifier.",
    )
