"""The `ocr` reward: how near the text in a picture is to the text that its prompt quotes.

It is the text-rendering reward of Flow-GRPO (arXiv 2505.05470): 1 - edit distance / length of the target, at least 0,
without spaces and in lower case. Two readers of different generations are there: train on one, evaluate by the other.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pydantic
import torch

from branchtree.core.scores import Scores
from branchtree.errors import DataError
from branchtree.files.checksums import file_sha256
from branchtree.plugins import Condition, Media
from branchtree_rewards.ocr.readers import Engine, Reader, open_reader, weights
from branchtree_rewards.ocr.text import likeness, plain, quoted_text
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.reward import Reward, reward_hook
from branchtree_rewards.shared.samples import elongated, unreadable

UNQUOTED = (
    "the prompt quotes no text; put what the picture must show in double quotation marks, as in: a sign that says "
    '"OPEN"'
)


class OcrConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the `ocr` reward.

    Attributes:
        engine: The reader: "v6" is PP-OCRv6, "v4" PP-OCRv4. Train on one and evaluate by the other.
        measure: "edit" scores 1 - edit distance / length of the quoted text, at least 0. "contains" scores 1 too where
            the quoted text is a stretch of what was read, as the published code of Flow-GRPO does. "exact" scores 1
            where both are the same, and 0 elsewhere.
        detect: Whether text is searched for first. Without it the whole picture is read as one line, which is faster
            and suits small pictures that a word fills.
        boxes: The most lines of text that a picture may have; one with more scores 0. By default any number.
    """

    engine: Engine = "v6"
    measure: Literal["edit", "contains", "exact"] = "edit"
    detect: bool = True
    boxes: int | None = pydantic.Field(default=None, ge=1, le=10_000)

    @pydantic.model_validator(mode="after")
    def _counts_what_is_detected(self) -> "OcrConfig":
        if self.boxes is not None and not self.detect:
            raise ValueError("boxes: lines are only counted with detect: true")
        return self


class Ocr(Reward[OcrConfig]):
    """Scores how well the text in each picture agrees with the quoted text of its prompt, from 0 to 1."""

    name = "ocr"
    _reader: Reader

    def check(self, condition: Condition) -> None:
        """Refuse a condition whose prompt quotes no text. Raises DataError."""
        if quoted_text(condition.prompt) is None:
            raise DataError(f"{condition}: {self.name}: {UNQUOTED}")

    def load(self, device: torch.device) -> None:
        """Open the reader, which runs on the CPU whatever the device. Raises RewardError."""
        self._reader = open_reader(self._config.engine, self._config.detect)
        super().load(device)

    def fingerprint(self) -> str:
        """Return a digest of the reader's weights and of the settings: equal ones give equal scores."""
        digests = [file_sha256(file) for file in weights(self._config.engine)]
        return hashlib.sha256("\n".join([*digests, self._config.model_dump_json()]).encode()).hexdigest()

    def _shape_flaw(self, media: Media) -> str | None:
        return elongated(media)

    def _prompt_flaw(self, prompt: str) -> str | None:
        return unreadable(prompt) or (UNQUOTED if quoted_text(prompt) is None else None)

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        read = [self._reader.read(np.asarray(picture)) for picture in to_pil(media.pixels)]
        targets = [plain(quoted_text(condition.prompt) or "") for condition in conditions]
        figures = torch.tensor([self._judge(*pair) for pair in zip(targets, read, strict=True)])
        value, exact, lines = figures.unbind(dim=1)
        return Scores(value, torch.ones(len(value), dtype=torch.bool), details={"exact": exact, "lines": lines})

    def _judge(self, target: str, lines: Sequence[str]) -> tuple[float, float, float]:
        """Return the score, whether the text is exactly the target, and the number of lines."""
        read = plain("".join(lines))
        exact = float(read == target)
        if self._config.boxes is not None and len(lines) > self._config.boxes:
            score = 0.0
        elif self._config.measure == "exact":
            score = exact
        elif self._config.measure == "contains" and target in read:
            score = 1.0
        else:
            score = likeness(target, read)
        return score, exact, float(len(lines))


register_rewards = reward_hook((Ocr, OcrConfig))
