"""What the rewards with published weights share: where they load from, how they batch, and when they leave the device.

A reward of this kind subclasses `ModelReward` and says how its networks are opened and how samples are measured; the
checks, the cap on memory, the scale and the masks are here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from branchtree.core.scores import Scores
from branchtree.files.checksums import file_sha256
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media, RewardFootprint
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.samples import check_batch, elongated, find_flaws, score_rest, unreadable_or_empty
from branchtree_rewards.shared.scale import ScaleName, transform
from branchtree_rewards.shared.source import RANDOM_SMALL, verify


class ModelRewardConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings that every reward with published weights takes.

    Attributes:
        path: A hub id, a folder, a weights file, or "random:small" for a tiny random checkpoint.
        revision: Branch, tag or commit of the hub id.
        sha256: The weights file's digest, or digests by file name; loading fails if one differs.
        scale: The transform from the published score to the trained value: "raw", "x100", "div26", "mix(18,8)" or
            "clipscore", with numbers of your own.
        batch: Samples sent through the model at a time.
        offload: Leave the device after scoring, and return when needed.
    """

    path: PathOrName
    revision: str | None = None
    sha256: str | dict[str, str] | None = None
    scale: ScaleName = "raw"
    batch: int = pydantic.Field(default=16, ge=1, le=10_000)
    offload: bool = False


@dataclass(frozen=True)
class Opened:
    """A loaded checkpoint."""

    network: nn.Module  # everything that moves to the device
    files: Mapping[str, Path]  # the files its weights came from, by their names in the checkpoint
    described: tuple[Path, ...] = ()  # files of settings that change a score


@dataclass(frozen=True)
class Measured:
    """What a model says of B samples."""

    raw: Tensor  # (B,) the published score
    details: Mapping[str, Tensor] = field(default_factory=dict)  # further figures (B,) by name


Config = TypeVar("Config", bound=ModelRewardConfig)


class ModelReward(ABC, Generic[Config]):
    """A reward whose weights someone has published."""

    modalities: frozenset[str] = frozenset({"image"})
    reads_prompt: bool = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._scale = transform(config.scale)
        self._opened: Opened | None = None
        self._device = torch.device("cpu")

    @abstractmethod
    def _open(self) -> Opened:
        """Load the networks, in float32 unless the reward says otherwise, on the CPU. Raises RewardError."""

    @abstractmethod
    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        """Score at most ``batch`` samples without flaws. ``network`` and the pixels of ``media`` are on the device."""

    def _shape_flaw(self, media: Media) -> str | None:
        """Say why no sample of this shape, length and frame rate can be scored, if none can."""
        return elongated(media)

    def _prompt_flaw(self, prompt: str) -> str | None:
        """Say why a prompt cannot be read, if it cannot be; a reward that does not read prompts takes any."""
        return unreadable_or_empty(prompt) if self.reads_prompt else None

    def _skeleton(self) -> Skeleton | None:
        """The network without weights, of configuration files alone; None if it cannot be told before loading."""
        return None

    def footprint(self) -> RewardFootprint | None:
        """The memory of the weights on an accelerator; None if it is not known, or configuration files are damaged."""
        if self._config.path == RANDOM_SMALL:
            return RewardFootprint(0, self._config.offload)
        try:
            skeleton = self._skeleton()
        except Exception:  # the libraries below have exceptions of their own; loading will say what is wrong
            return None
        return None if skeleton is None else skeleton.footprint(self._config.offload)

    def load(self, device: torch.device) -> None:
        """Load the model and put it on ``device``, or keep it off until it is needed under ``offload``.

        Raises RewardError if files are missing, damaged, not those pinned, or do not fit the model.
        """
        opened = self._open()
        verify(opened.files, self._config.sha256)
        opened.network.eval().requires_grad_(False)
        self._opened, self._device = opened, device
        if not self._config.offload:
            opened.network.to(device)

    def release(self) -> None:
        """Leave the device until the next ``score``, if the recipe asks for it with ``offload``."""
        if self._opened and self._config.offload:
            self._opened.network.to("cpu")

    def fingerprint(self) -> str:
        """A digest of the weights and of the settings that change a score: equal ones give equal scores."""
        opened = self._require_opened()
        digest = hashlib.sha256()
        for name, file in sorted(opened.files.items()):
            digest.update(f"{name} {file_sha256(file)}\n".encode())
        for file in opened.described:
            digest.update(f"{file_sha256(file)}\n".encode())
        neutral = {"path", "revision", "sha256", "batch", "offload"}
        digest.update(self._config.model_dump_json(exclude=neutral).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score sample i against condition i.

        Args:
            media: Images (B, C, H, W) or videos (B, F, C, H, W), as the reward's modalities say, float in [0, 1].
            conditions: B conditions.

        Returns:
            Scores (B,) on the CPU: `values` after the scale, `raw` before it. A sample that cannot be scored is not
            valid, and a reason says why: its pixels are not finite, its shape cannot be shown to the model, or its
            prompt cannot be read. The others get the scores that they have without it.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: the media are of another kind, or there are not B conditions.
        """
        network = self._require_opened().network
        check_batch(media, conditions, self.modalities)
        network.to(self._device)
        size = self._config.batch
        spans = [slice(start, start + size) for start in range(0, len(media), size)]
        return Scores.concatenate([self._score_chunk(network, media[span], conditions[span]) for span in spans])

    def _score_chunk(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Scores:
        pixels = media.pixels.to(self._device, torch.float32)
        moved = Media(images=pixels) if media.images is not None else Media(videos=pixels, fps=media.fps)
        flaws = find_flaws(moved, conditions, self._shape_flaw, self._prompt_flaw)
        return score_rest(
            moved, conditions, flaws, lambda good, theirs: self._scores(self._measure(network, good, theirs))
        )

    def _scores(self, measured: Measured) -> Scores:
        raw = measured.raw.detach().float().cpu()
        valid = raw.isfinite()
        nameless = (~valid).nonzero().flatten().tolist()
        return Scores(
            values=self._scale(raw),
            valid=valid,
            raw=raw,
            details={name: value.detach().float().cpu() for name, value in measured.details.items()},
            reasons=dict.fromkeys(nameless, "the model's score is not finite"),
        )

    def _require_opened(self) -> Opened:
        if self._opened is None:
            raise RuntimeError("this reward was not loaded: call load(device) first")
        return self._opened
