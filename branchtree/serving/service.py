"""A served reward, loaded and called on one thread, so that its calls never overlap."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import branchtree
from branchtree.errors import BranchTreeError, PluginError, RewardError
from branchtree.plugins.protocols import Fingerprinted, GroupReward, ReadsPrompt, ReleasesMemory, RewardAdapter
from branchtree.plugins.registry import registry
from branchtree.plugins.scores import ask
from branchtree.serving.wire import Info, WireError, decode_request, encode_scores

IDLE = 10.0  # seconds without a request before the reward's `release` is called


@dataclass(frozen=True)
class NamedAdapter:
    """A reward to serve, not yet loaded."""

    name: str
    options: Mapping[str, Any]  # as validated, JSON
    adapter: RewardAdapter


class Service:
    """Loads a reward and answers requests with it."""

    def __init__(self, reward: NamedAdapter, device: torch.device, max_body: int) -> None:
        self.max_body = max_body
        self.info: Info | None = None  # once the reward is loaded
        self._reward, self._device = reward, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._idle: asyncio.TimerHandle | None = None

    async def load(self) -> Info:
        """Load the reward. Raises RewardError with the reason if that fails."""
        try:
            self.info = await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except BranchTreeError:
            raise
        except Exception as error:  # a reward is a plug-in and can raise anything
            name = self._reward.name
            raise RewardError(f"reward '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
        return self.info

    async def score(self, body: bytes) -> bytes:
        """Answer one request, after earlier ones. Raises WireError, or RewardError if the reward fails."""
        loop = asyncio.get_running_loop()
        if self._idle:
            self._idle.cancel()
        try:
            return await loop.run_in_executor(self._thread, self._score, body)
        finally:
            if isinstance(self._reward.adapter, ReleasesMemory):
                self._idle = loop.call_later(IDLE, self._thread.submit, self._reward.adapter.release)

    def close(self) -> None:
        """Accept no more requests; a running one still finishes."""
        if self._idle:
            self._idle.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> Info:
        adapter = self._reward.adapter
        try:
            for modality in sorted(adapter.modalities):
                registry().kind(modality)  # else what is sent could not be made samples again
        except PluginError as error:
            raise RewardError(f"reward '{self._reward.name}' cannot be served: {error}") from None
        adapter.load(self._device)
        fingerprint = adapter.fingerprint() if isinstance(adapter, Fingerprinted) else None
        return Info(
            version=branchtree.__version__,
            reward=self._reward.name,
            options=dict(self._reward.options),
            modalities=tuple(sorted(adapter.modalities)),
            groupwise=isinstance(adapter, GroupReward) and adapter.groupwise,
            reads_prompt=not isinstance(adapter, ReadsPrompt) or adapter.reads_prompt,
            fingerprint=fingerprint,
            identity=_identity(self._reward, fingerprint),
            max_body=self.max_body,
        )

    def _score(self, body: bytes) -> bytes:
        adapter = self._reward.adapter
        with tempfile.TemporaryDirectory(prefix="branchtree-serve-") as folder:
            request = decode_request(body, Path(folder))
            if request.media.modality not in adapter.modalities:
                scored = " and ".join(f"{modality}s" for modality in sorted(adapter.modalities))
                raise WireError(f"reward '{self._reward.name}' scores {scored}, not {request.media.modality}s")
            scores = ask(self._reward.name, adapter, request.media, request.conditions)
            reasons = {row: request.in_words_of_client(reason) for row, reason in scores.reasons.items()}
            return encode_scores(replace(scores, reasons=reasons))


def _identity(reward: NamedAdapter, fingerprint: str | None) -> str:
    """Return a digest that changes with whatever may change a score: of the fingerprint, or else of the options."""
    settings = fingerprint or json.dumps(reward.options, sort_keys=True)
    return hashlib.sha256(f"{branchtree.__version__}\n{reward.name}\n{settings}".encode()).hexdigest()
