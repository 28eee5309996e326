"""Base classes of rewards: the checks and masks of all, and the loading, batches and offloading of those with weights.

A reward subclasses `Reward` and says how samples are scored, or `ModelReward` and says how its network is opened and
how samples are measured.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from branchtree.core.scores import Scores
from branchtree.files.checksums import file_sha256
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media, RewardCard, RewardFootprint
from branchtree.plugins.hookspecs import hookimpl
from branchtree_rewards.shared import samples
from branchtree_rewards.shared.footprints import Skeleton
from branchtree_rewards.shared.scale import ScaleName, transform
from branchtree_rewards.shared.source import RANDOM_SMALL, bundled_json, verify
from branchtree_rewards.shared.tokenizers import own_token


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


Config = TypeVar("Config", bound=pydantic.BaseModel)
ModelConfig = TypeVar("ModelConfig", bound=ModelRewardConfig)


class Reward(ABC, Generic[Config]):
    """A reward that masks the samples it cannot score and scores the others as if those were not there."""

    name: ClassVar[str] = "unregistered"
    modalities: frozenset[str] = frozenset({"image"})
    reads_prompt: bool = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._device = torch.device("cpu")
        self._loaded = False

    @abstractmethod
    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score at least one sample without flaws; pixels are float32 and on the device."""

    def _rows_at_once(self) -> int | None:
        """Return how many samples are scored at a time, at most; None for all that are given."""
        return None

    def _seen(self, media: Media) -> Media:
        """Return the pixels that scores depend on, in float32 on the device."""
        return samples.with_pixels(media, media.pixels.to(self._device, torch.float32))

    def _shape_flaw(self, media: Media) -> str | None:
        """Say why no sample of this shape, length and frame rate can be scored, if none can."""
        return None

    def _prompt_flaw(self, prompt: str) -> str | None:
        """Say why a prompt cannot be read, if it cannot be; a reward that does not read prompts takes any."""
        return samples.unreadable_or_empty(prompt) if self.reads_prompt else None

    def _condition_flaw(self, condition: Condition) -> str | None:
        """Say why no sample of a condition can be scored, if none can: that its prompt cannot be read."""
        return self._prompt_flaw(condition.prompt)

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of the weights on an accelerator: none, unless a reward says otherwise."""
        return RewardFootprint(0)

    def load(self, device: torch.device) -> None:
        """Load what scoring needs, to score on ``device``; call once before `score`."""
        self._device, self._loaded = device, True

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score sample i against condition i.

        Args:
            media: Images (B, C, H, W) or videos (B, F, C, H, W), as the reward's modalities say, float in [0, 1].
            conditions: B conditions.

        Returns:
            Scores (B,). A sample that cannot be scored is not valid, and a reason says why: its pixels are not finite,
            its shape cannot be shown to the reward, or its prompt cannot be read. The others get the scores that they
            have without it.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: the media are of another kind, or there are not B conditions.
        """
        self._require_loaded()
        samples.check_batch(media, conditions, self.modalities)
        size = self._rows_at_once()
        if size is None:
            return self._score_batch(media, conditions)
        batches = samples.spans(len(media), size)
        return Scores.concatenate([self._score_batch(media[rows], conditions[rows]) for rows in batches])

    def _score_batch(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        seen = self._seen(media)
        flaws = samples.find_flaws(seen, conditions, self._shape_flaw, self._condition_flaw)
        return samples.score_rest(seen, conditions, flaws, self._scores)

    def _require_loaded(self) -> None:
        if not self._loaded:
            raise RuntimeError(f"the {self.name} reward was not loaded: call load(device) before score(...)")


def reward_hook(*rewards: tuple[type[Reward[Any]], type[pydantic.BaseModel]]) -> Callable[..., None]:
    """Return the hook ``register_rewards`` of a module, for its rewards and their settings.

    Their summaries and the facts of their cards are in `data/cards.json`.
    """

    @hookimpl
    def register_rewards(register: Callable[..., None]) -> None:
        cards = bundled_json("cards.json")
        for reward, config in rewards:
            facts = cards[reward.name]
            summary, card = facts.pop("summary"), RewardCard(modalities=reward.modalities, **facts)
            register(reward.name, build=reward, config=config, summary=summary, card=card)

    return register_rewards


@dataclass(frozen=True)
class Opened:
    """A loaded checkpoint."""

    network: nn.Module  # everything that moves to the device
    files: Mapping[str, Path]  # the files its weights came from, by their names in the checkpoint
    described: tuple[Path, ...] = ()  # files of settings that change a score


@dataclass(frozen=True)
class Measured:
    """A model's figures of B samples."""

    raw: Tensor  # (B,) the published score
    details: Mapping[str, Tensor] = field(default_factory=dict)  # further figures (B,) by name

    def scores(self, scale: Callable[[Tensor], Tensor], reason: str = "the model's score is not finite") -> Scores:
        """Return the scores on the CPU, ``raw`` under ``scale``; ``reason`` says why one that is not finite is not."""
        raw = self.raw.detach().float().cpu()
        valid = raw.isfinite()
        details = {name: figure.detach().float().cpu() for name, figure in self.details.items()}
        nameless = (~valid).nonzero().flatten().tolist()
        return Scores(scale(raw), valid, raw, details, dict.fromkeys(nameless, reason))


class ModelReward(Reward[ModelConfig]):
    """A reward whose weights someone has published."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._scale = transform(config.scale)
        self._opened: Opened | None = None
        self._tokenizer: Any = None  # of a reward that reads prompts by one; set by ``_open``

    @abstractmethod
    def _open(self) -> Opened:
        """Load the networks, in float32 unless the reward says otherwise, on the CPU. Raises RewardError."""

    @abstractmethod
    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        """Measure at most ``batch`` samples without flaws; ``network`` and pixels are on the device."""

    def _rows_at_once(self) -> int:
        return self._config.batch

    def _shape_flaw(self, media: Media) -> str | None:
        return samples.elongated(media)

    def _prompt_flaw(self, prompt: str) -> str | None:
        flaw = super()._prompt_flaw(prompt)
        return flaw if flaw or self._tokenizer is None else own_token(self._tokenizer, prompt)

    def _skeleton(self) -> Skeleton | None:
        """Return the network without weights, made of configuration files alone; None if they do not tell it."""
        return None

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of the weights on an accelerator; None if configuration files do not tell it."""
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
        if not self._config.offload:
            opened.network.to(device)
        self._opened = opened
        super().load(device)

    def release(self) -> None:
        """Leave the device until the next ``score``, if the recipe asks for it with ``offload``."""
        if self._opened and self._config.offload:
            self._opened.network.to("cpu")

    def fingerprint(self) -> str:
        """Return a digest of the weights and of the settings that change a score: equal ones give equal scores."""
        opened = self._require_opened()
        digest = hashlib.sha256()
        for name, file in sorted(opened.files.items()):
            digest.update(f"{name} {file_sha256(file)}\n".encode())
        for file in opened.described:
            digest.update(f"{file_sha256(file)}\n".encode())
        neutral = {"path", "revision", "sha256", "batch", "offload"}
        digest.update(self._config.model_dump_json(exclude=neutral).encode())
        return digest.hexdigest()

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        network = self._require_opened().network.to(self._device)
        return self._measure(network, media, conditions).scores(self._scale)

    def _require_opened(self) -> Opened:
        self._require_loaded()
        assert self._opened is not None
        return self._opened
