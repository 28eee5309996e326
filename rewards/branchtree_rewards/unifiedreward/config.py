"""The settings of UnifiedReward: those of a model in this process, those of a server, and the question."""

from __future__ import annotations

import re
from typing import Literal

import pydantic

from branchtree.files.paths import PathOrName
from branchtree_rewards.shared.reward import ModelRewardConfig
from branchtree_rewards.shared.source import RANDOM_SMALL
from branchtree_rewards.unifiedreward.templates import FIELDS, FieldName, TemplateName

PUBLISHED = "CodeGoat24/UnifiedReward-qwen-7b"
ImageFormat = Literal["jpeg", "png"]
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
        changed = {name for name, key in type(self).model_fields.items() if getattr(self, name) != key.default}
        idle = [name for name in (REMOTE if self.server is None else LOCAL) if name in changed]
        if idle and self.server is None:
            raise ValueError(f"{', '.join(idle)} belong to a server, and 'server' is not given")
        if idle:
            raise ValueError(f"{', '.join(idle)} belong to a model in this process, and 'server' is given; remove one")
        return self

    @property
    def measured(self) -> FieldName:
        """The field that is the reward."""
        return self.field or FIELDS[self.template][0]
