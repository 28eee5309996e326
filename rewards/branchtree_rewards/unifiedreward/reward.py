"""The `unifiedreward` reward: a vision-language model is asked for a score between 1 and 5, and its words are read.

UnifiedReward (Wang et al., arXiv 2503.05236). The model runs in this process, or behind a server that speaks OpenAI's
protocol. An answer that holds no score in the form asked for is not valid; it is never read as some number.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import pydantic
import torch

from branchtree.core.scores import Scores
from branchtree.files.paths import PathOrName
from branchtree.plugins.hookspecs import hookimpl
from branchtree.plugins.protocols import Condition, Media, RewardCard, RewardFootprint
from branchtree_rewards.shared.pixels import to_pil
from branchtree_rewards.shared.reward import ModelRewardConfig, Reward
from branchtree_rewards.shared.samples import elongated
from branchtree_rewards.shared.scale import transform
from branchtree_rewards.shared.source import RANDOM_SMALL, refuse_name
from branchtree_rewards.unifiedreward.local import PUBLISHED, LocalModel
from branchtree_rewards.unifiedreward.server import ChatServer, ImageFormat
from branchtree_rewards.unifiedreward.templates import (
    AXES,
    FIELDS,
    OTHERS,
    FieldName,
    NoScore,
    Spoken,
    TemplateName,
    fill_template,
    read_axes,
    read_field,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL = ("path", "revision", "sha256", "batch", "offload", "dtype")
REMOTE = ("model", "api_key_env", "concurrency", "timeout", "retries", "wait", "image_format")


class UnifiedRewardConfig(ModelRewardConfig, frozen=True):
    """Settings of the `unifiedreward` reward.

    Attributes:
        path: A hub id, a folder, or "random:small", which also stands in for a server. The model must be one that
            transformers loads without further code.
        batch: Questions that a model in this process answers at a time.
        dtype: Precision of a model in this process; None is bfloat16 on CUDA and float32 elsewhere.
        server: Base URL of an OpenAI-compatible server, such as http://127.0.0.1:8080/v1; nothing is loaded then.
        model: The name that the server's model is served under; None for the one that it lists.
        api_key_env: The environment variable that holds the server's key. The key itself is never written down.
        concurrency: Questions sent to the server at once.
        timeout: Seconds that one answer of the server may take.
        retries: How often a question is sent again after a time-out, a lost connection, or HTTP 408, 429, 500, 502,
            503 or 504.
        wait: Seconds to wait at the start for a server that is not up yet.
        image_format: How pictures are sent: JPEG of quality 95, or PNG.
        template: The question: "semantic" (the first models', with scores word by word), "score" (the first models',
            one score), "acs_v2" (the 2.0 models'), or "flowgrpo_llava" (flow_grpo's, for UnifiedReward-7b-v1.5).
        field: The score that is the reward: "alignment", "coherence", "style" or their "mean" with semantic and
            acs_v2, "final" with the others. None is "alignment" or "final".
        max_tokens: Length of an answer, at most.
        resize: Width and height that pictures are resized to first; None leaves them as they are.
    """

    path: PathOrName = PUBLISHED
    batch: int = pydantic.Field(default=8, ge=1, le=10_000)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    server: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = pydantic.Field(default=8, ge=1, le=256)
    timeout: float = pydantic.Field(default=120.0, gt=0, le=1e6)
    retries: int = pydantic.Field(default=4, ge=0, le=20)
    wait: float = pydantic.Field(default=0.0, ge=0, le=1e6)
    image_format: ImageFormat = "jpeg"
    template: TemplateName = "semantic"
    field: FieldName | None = None
    max_tokens: int = pydantic.Field(default=4096, ge=1, le=1_000_000)
    resize: int | None = pydantic.Field(default=None, ge=1, le=8192)

    @pydantic.field_validator("server")
    @classmethod
    def _is_url(cls, server: str | None) -> str | None:
        if server is not None and not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", server):
            raise ValueError(
                f"'{server}' is no base URL; write it like http://127.0.0.1:8080/v1, and name a key's environment "
                "variable as api_key_env"
            )
        return server

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> UnifiedRewardConfig:
        fields = FIELDS[self.template]
        if self.field is not None and self.field not in fields:
            raise ValueError(f"template '{self.template}' has no field '{self.field}'; it has {', '.join(fields)}")
        if self.path == RANDOM_SMALL:
            return self
        idle = [name for name in (REMOTE if self.server is None else LOCAL) if self._changed(name)]
        if idle and self.server is None:
            raise ValueError(f"{', '.join(idle)} belong to a server, and 'server' is not given")
        if idle:
            raise ValueError(f"{', '.join(idle)} belong to a model in this process, and 'server' is given; remove one")
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def measured(self) -> FieldName:
        """The field that is the reward."""
        return self.field or FIELDS[self.template][0]


class UnifiedReward(Reward[UnifiedRewardConfig]):
    """Asks a vision-language model how well each image shows its prompt.

    The score `raw` is the model's number, from 1 to 5; details hold the three axes, NaN where the model was not asked
    for them or did not give them. A sample whose answer holds no score is not valid.
    """

    name = "unifiedreward"

    def __init__(self, config: UnifiedRewardConfig) -> None:
        super().__init__(config)
        self._scale = transform(config.scale)
        self._backend = _backend(config)

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of the weights on an accelerator, 0 for a server's; None if files are damaged."""
        return self._backend.footprint()

    def load(self, device: torch.device) -> None:
        """Load the model to ``device``, or find the server in good health. Raises RewardError."""
        self._check_template()
        self._backend.load(device)
        self._check_template()  # again: the name of a server's only model is known once it is asked
        super().load(torch.device("cpu"))  # where pictures are made of pixels

    def _check_template(self) -> None:
        template = self._config.template
        refuse_name(self._backend.name, OTHERS[template], f"it was not trained on template '{template}'; set template")

    def release(self) -> None:
        """Leave the device until the next ``score``, if the recipe asks for it with ``offload``."""
        self._backend.release()

    def fingerprint(self) -> str:
        """Return a digest of the settings that change a score, and of the weights, or of a server's name for them."""
        self._require_loaded()
        neutral = {*LOCAL, *REMOTE, "server"} - {"dtype", "image_format"}
        settings = self._config.model_dump_json(exclude=neutral)
        return hashlib.sha256((self._backend.identity() + settings).encode()).hexdigest()

    def _shape_flaw(self, media: Media) -> str | None:
        return elongated(media)

    def _prompt_flaw(self, prompt: str) -> str | None:
        asked = fill_template(self._config.template, prompt)
        return super()._prompt_flaw(prompt) or self._backend.prompt_flaw(prompt, asked)

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        questions = [fill_template(self._config.template, condition.prompt) for condition in conditions]
        pictures, size = to_pil(media.pixels), self._config.resize
        if size is not None:
            pictures = [picture.resize((size, size)) for picture in pictures]
        return self._read(self._backend.answers(pictures, questions))

    def _read(self, answers: Sequence[Spoken | NoScore]) -> Scores:
        """Return the scores in the answers."""
        raw = torch.full((len(answers),), math.nan, dtype=torch.float32)
        details = {name: torch.full_like(raw, math.nan) for name in AXES}
        reasons = {}
        for row, answer in enumerate(answers):
            score = answer if isinstance(answer, NoScore) else read_field(answer, self._config.measured)
            if isinstance(score, NoScore):
                reasons[row] = score.reason
            else:
                raw[row] = score
            if isinstance(answer, Spoken):
                for name, value in read_axes(answer, self._config.template).items():
                    details[name][row] = value
        return Scores(self._scale(raw), raw.isfinite(), raw, details, reasons)


def _backend(config: UnifiedRewardConfig) -> LocalModel | ChatServer:
    if config.server is None or config.path == RANDOM_SMALL:
        return LocalModel(
            name=config.path,
            revision=config.revision,
            pin=config.sha256,
            dtype=DTYPES[config.dtype] if config.dtype else None,
            batch=config.batch,
            max_tokens=config.max_tokens,
            offload=config.offload,
        )
    return ChatServer(
        url=config.server,
        model=config.model,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        wait=config.wait,
        max_tokens=config.max_tokens,
        image_format=config.image_format,
    )


@hookimpl
def register_rewards(register: Callable[..., None]) -> None:
    """Add the `unifiedreward` reward to the registry."""
    register(
        UnifiedReward.name,
        build=UnifiedReward,
        config=UnifiedRewardConfig,
        summary="UnifiedReward: a vision-language model's score from 1 to 5, in this process or from a server.",
        card=RewardCard(
            modalities=UnifiedReward.modalities,
            checkpoint=PUBLISHED,
            size=None,
            licence="MIT, by its repository",
            non_commercial=False,
            source="arXiv 2503.05236, https://github.com/CodeGoat24/UnifiedReward",
        ),
    )
