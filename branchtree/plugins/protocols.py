"""What the core asks of a model and of a reward, and the small values that cross that boundary.

Axis letters: P prompts, B rows of a batch, C channels, H height, W width, F frames. ``*latent`` is the
shape of one sample's latents; the core stores such states and never looks inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from branchtree.core.scores import Scores
from branchtree.errors import shortened

Conditioning = Mapping[str, Tensor]
"""Encoded conditions of P prompts: named tensors whose first axis is P."""


@dataclass(frozen=True)
class Condition:
    """What one sample is asked to show."""

    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None  # the first frame of a video that is to be made
    last_image: Path | None = None  # its last frame
    video: Path | None = None  # its first frame stands in for ``image``
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)  # file and line it was read from

    def __str__(self) -> str:
        """How a message names it: by its place and its prompt."""
        prompt = shortened(self.prompt)
        return f"{self.place}: '{prompt}'" if self.place else f"'{prompt}'"


@dataclass(frozen=True)
class Media:
    """Decoded samples: either images or videos, float32 in [0, 1]."""

    images: Tensor | None = None  # (B, C, H, W)
    videos: Tensor | None = None  # (B, F, C, H, W)
    fps: float | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.videos is None):
            raise ValueError("Media holds either images or videos, and not both")

    @property
    def modality(self) -> str:
        """``"image"`` or ``"video"``."""
        return "video" if self.images is None else "image"

    @property
    def pixels(self) -> Tensor:
        """The images (B, C, H, W) or the videos (B, F, C, H, W)."""
        pixels = self.videos if self.images is None else self.images
        assert pixels is not None
        return pixels

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __getitem__(self, rows: slice) -> Media:
        if self.images is None:
            return Media(videos=self.pixels[rows], fps=self.fps)
        return Media(images=self.pixels[rows])

    @staticmethod
    def joined(parts: Sequence[Media]) -> Media:
        """Media of one kind and size, one after the other."""
        if len(parts) == 1:
            return parts[0]
        pixels = torch.cat([part.pixels for part in parts])
        return Media(videos=pixels, fps=parts[0].fps) if parts[0].images is None else Media(images=pixels)


@dataclass(frozen=True)
class RewardCard:
    """What a user should know of a reward before using it; ``branchtree rewards`` lists it."""

    modalities: frozenset[str]
    checkpoint: str  # hub id and file, or "none"
    size: int | None  # bytes to download; None if not known
    licence: str  # of the weights
    non_commercial: bool | None  # whether the licence forbids commercial use; None where it depends
    source: str  # paper, repository or model card


@dataclass(frozen=True)
class DecoderFootprint:
    """Sizes of a model's decoder at work."""

    parameters: int
    numbers_per_row: int  # alive at once while one row is decoded, beside the weights
    flops_per_row: float
    media_numbers_per_row: int  # of one decoded sample, which is float32
    rows: int | None = None  # that go through it at once, at most; all that it is given by default
    number_bytes: int | None = None  # of its weights and activations, where they do not follow the run's precision


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model, known without loading its weights; the plan's memory estimate is made of them."""

    denoiser_parameters: int
    frozen_parameters: int  # encoders and VAE
    latent_shape: tuple[int, ...]
    activation_numbers_per_row: int  # kept for the backward pass of one row
    checkpointed_numbers_per_row: int  # the same under gradient checkpointing
    forward_flops_per_row: float
    rows_per_prediction: int  # 2 under classifier-free guidance
    lora_parameters_per_rank: int
    source: str  # where these figures come from
    forward_numbers_per_row: int = 0  # alive at once in one row's forward without gradients; 0 if not known
    conditioning_numbers: int = 0  # of one prompt's encoding; 0 if not known
    attention_flops_per_row: float = 0.0  # of a forward, those of products in which no weight takes part
    frozen_float32_parameters: int = 0  # of the frozen ones, those that stay in float32 whatever the precision
    largest_block_parameters: int = 0  # what sharding gathers at a time; 0 if not known
    decoder: DecoderFootprint | None = None  # None if not known
    assumed: bool = False  # whether the figures are another model's, since this one's are not known

    def frozen_bytes(self, size: int) -> int:
        """Bytes of the frozen parts where a number of the run's precision takes ``size`` bytes."""
        return self.frozen_parameters * size + self.frozen_float32_parameters * (4 - size)


@dataclass(frozen=True)
class RewardFootprint:
    """Memory of a reward on an accelerator, known without loading its weights."""

    weights: int  # bytes
    offloads: bool = False  # whether they are there only while the reward scores
    assumed: str = ""  # whose size this is, where that of the checkpoint that is named is not known


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation: rank, scale, and the module names it is put on (the adapter's own by default)."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | None = None


class ModelAdapter(Protocol):
    """A model family. Built from its own configuration; nothing is loaded before ``load``.

    Further abilities are declared by further methods: see ``NamesItsMedia``, ``FingerprintedEncodings``,
    ``DropsEncoders``, ``CompilesBlocks`` and ``StartsFromWeights``.
    """

    @property
    def modality(self) -> str:
        """``"image"`` or ``"video"``: what ``decode`` returns."""

    @property
    def prediction(self) -> str:
        """``"velocity"`` for flow matching; ``"noise"`` or ``"v"`` for variance-preserving models."""

    @property
    def rows_per_prediction(self) -> int:
        """Rows sent through the denoiser for each row predicted: 2 under classifier-free guidance."""

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained."""

    def footprint(self) -> Footprint:
        """The model's sizes, from its configuration files alone. Raises ModelError if a named folder is missing."""

    def check(self, condition: Condition) -> None:
        """Refuse a condition that this model cannot take, before anything is loaded.

        Raises DataError that names the condition and says what would be right.
        """

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Load the denoiser to ``device`` in ``denoiser_dtype``, and frozen parts in ``dtype``.

        Encoders may wait for the first ``encode``. Raises ModelError if the folder or hub id cannot be read.
        """

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Freeze the denoiser and put fresh float32 low-rank weights on it, initialised from ``seed``."""

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``denoiser`` acts as the model did before LoRA."""

    def enable_gradient_checkpointing(self) -> None:
        """Trade computation for memory in the gradient pass."""

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions, float tensors on the CPU with P as first axis, each row independent of the others."""

    def release_frozen(self) -> None:
        """Move encoders and decoder off the device, until ``encode`` or ``decode`` needs them again."""

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """One sample's starting latents (*latent), float32 on the CPU, standard normal."""

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline's own time grid, (steps + 1,) float32 from 1 (or near) to 0."""

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The model's prediction for latents (B, *latent) at sigma (B,), float32 (B, *latent).

        It is computed in the dtype that the denoiser was loaded in; a run calls it under autocast where it trains
        float32 weights in bfloat16, and never with low-rank weights. ``conditioning`` has B rows. ``denoiser`` is the
        module to send them through: the adapter's own by default, or the same one wrapped for distributed training, or
        a frozen copy.
        """

    def decode(self, latents: Tensor) -> Media:
        """Decode clean latents (B, *latent) to media in [0, 1], on the CPU or the device.

        On a CPU another thread may call ``predict`` meanwhile; none calls ``encode``.
        """

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained part in the layout its own library reads.

        ``denoiser_state`` holds weights to write in place of the trained ones: every trainable parameter, by its
        name in ``denoiser``. Raises CheckpointError if they do not fit.
        """

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what a user loads: the complete pipeline, or under LoRA the low-rank weights alone."""

    def restore(self, directory: Path) -> None:
        """Read back, to the bit and before any sharding, the trained weights that ``save`` wrote.

        Raises CheckpointError if they do not fit.
        """


@runtime_checkable
class NamesItsMedia(Protocol):
    """A model that says which images and videos of a condition it looks at; others may look at all."""

    @property
    def media(self) -> frozenset[str]:
        """Some of ``image``, ``last_image`` and ``video``, or none; known before ``load``."""


@runtime_checkable
class FingerprintedEncodings(Protocol):
    """A model that can say what its encodings depend on, so that they may be kept on disk."""

    def encoding_fingerprint(self) -> str | None:
        """A digest of weights, settings and libraries: models with equal ones encode a condition alike.

        The device, torch itself and the condition are not part of it. None if it cannot be told. Called after ``load``,
        and does not load encoders.
        """


@runtime_checkable
class DropsEncoders(Protocol):
    """A model that reads its encoders when ``encode`` needs them, and can do without them again."""

    def drop_encoders(self) -> None:
        """Free the encoders' memory on device and host until the next ``encode``."""


@runtime_checkable
class CompilesBlocks(Protocol):
    """A model whose denoiser can be compiled block by block."""

    def compile_blocks(self, denoiser: nn.Module, backend: str) -> None:
        """Compile the repeated blocks of ``denoiser``, the model's own or a copy, with a back-end of torch.compile.

        Called after ``add_lora`` and ``enable_gradient_checkpointing``; nothing is compiled before the first forward.
        """


@runtime_checkable
class StartsFromWeights(Protocol):
    """A model that takes up weights of another origin than ``save``; without this, ``restore`` reads them."""

    def start_from(self, source: Path) -> None:
        """Put weights, from a file or a folder, in place of those to be trained, after ``add_lora``, before sharding.

        Their precision and the scale of a LoRA may be others. Raises CheckpointError, which says what would fit.
        """


class RewardAdapter(Protocol):
    """A scorer of media. Built from its own configuration; nothing is loaded before ``load``.

    ``score`` may be called from another thread than ``load``, but never from two at once. Further abilities are
    declared by further methods: see ``GroupReward``, ``ReadsPrompt``, ``ReleasesMemory``, ``SizedReward`` and
    ``Fingerprinted``.
    """

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities it can score."""

    def load(self, device: torch.device) -> None:
        """Load what scoring needs."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score sample i against condition i. A sample that cannot be scored is marked invalid."""


@runtime_checkable
class GroupReward(Protocol):
    """A reward whose ``score`` must see all samples of a prompt at once, and no others."""

    @property
    def groupwise(self) -> bool:
        """True: every call of ``score`` gets one prompt's whole group."""


@runtime_checkable
class ReadsPrompt(Protocol):
    """A reward that says whether its scores depend on prompts; one that does not say is taken to read them."""

    @property
    def reads_prompt(self) -> bool:
        """Whether samples need a prompt to be scored."""


def needs_prompt(reward: RewardAdapter) -> bool:
    """Return whether a reward reads prompts, or compares samples that have a prompt in common."""
    compares = isinstance(reward, GroupReward) and reward.groupwise
    return compares or not isinstance(reward, ReadsPrompt) or reward.reads_prompt


@runtime_checkable
class ReleasesMemory(Protocol):
    """A reward that can leave the device while it has nothing to score."""

    def release(self) -> None:
        """Leave the device, if the reward's settings ask for it, until the next ``score``."""


@runtime_checkable
class SizedReward(Protocol):
    """A reward that can say how much memory its weights take, so that a plan can count them."""

    def footprint(self) -> RewardFootprint | None:
        """The memory of its weights, from configuration files alone; None if it cannot be told before loading."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A reward that can say which weights and settings its scores come from."""

    def fingerprint(self) -> str:
        """A digest: rewards with equal ones give equal scores. Called after ``load``."""


class Callback:
    """Follows a run, on the main process. Override what is of interest; an exception ends the run."""

    def on_start(self, output: Path, iteration: int, iterations: int) -> None:
        """Before the first iteration of this process: how many are done, and how many there are in all."""

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """After an iteration and its optimiser steps."""

    def on_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """After an evaluation, when ``iteration`` iterations were done."""

    def on_end(self, output: Path) -> None:
        """After the last iteration, when ``final/`` has been written."""
