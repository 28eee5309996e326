"""The values that pass between the library and its plug-ins: conditions, samples, sizes, settings.

Axis letters: P prompts, B rows of a batch, C channels, H height, W width, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import shortened

Conditioning = Mapping[str, Tensor]
"""Encoded conditions of P prompts: named tensors whose first axis is P. Rows may have zeros at their ends."""


@dataclass(frozen=True)
class Condition:
    """What one sample is asked to show."""

    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None  # to edit, or the first frame of a video that is to be made
    last_image: Path | None = None  # its last frame
    video: Path | None = None  # its first frame stands in for ``image``
    metadata: Mapping[str, Any] = field(default_factory=dict)
    location: str = field(default="", compare=False)  # file and line it was read from
    further_images: tuple[Path, ...] = ()  # beside ``image``, for models that take several

    @property
    def images(self) -> tuple[Path, ...]:
        """All images, in their order."""
        return (*(() if self.image is None else (self.image,)), *self.further_images)

    @property
    def files(self) -> tuple[Path | None, ...]:
        """What a sample may depend on beside the texts: image, last image and video, and further images."""
        return (self.image, self.last_image, self.video, *self.further_images)

    def __str__(self) -> str:
        """Return what a message calls it: where it was read, and its prompt."""
        prompt = shortened(self.prompt)
        return f"{self.location}: '{prompt}'" if self.location else f"'{prompt}'"


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
    def concatenate(batches: Sequence[Media]) -> Media:
        """Concatenate media of one kind and size."""
        first = batches[0]
        if len(batches) == 1:
            return first
        pixels = torch.cat([batch.pixels for batch in batches])
        return Media(videos=pixels, fps=first.fps) if first.images is None else Media(images=pixels)


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
    attention_flops_per_row: float = 0.0  # of a forward, those of products of activations alone
    frozen_float32_parameters: int = 0  # of the frozen ones, those that stay in float32 whatever the precision
    largest_block_parameters: int = 0  # what sharding gathers at a time; 0 if not known
    decoder: DecoderFootprint | None = None  # None if not known
    assumed: bool = False  # whether the figures are another model's, since this one's are not known

    def frozen_bytes(self, size: int) -> int:
        """Return the bytes of frozen components where a number of the run's precision takes ``size`` bytes."""
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


@dataclass(frozen=True)
class LoraSummary:
    """A LoRA file as it was understood."""

    path: str
    kind: str  # how its keys are named
    layers: int
    ranks: tuple[int, ...]  # all that there are, ascending
    strengths: tuple[float, ...]  # factors of B A, alpha over rank in most files, ascending
    targets: Mapping[str, int]  # by ending of the layers' names, how many layers

    def __str__(self) -> str:
        """Return one line for a person."""
        targets = ", ".join(f"{name} ({count})" for name, count in self.targets.items())
        ranks, strengths = (", ".join(f"{one:.6g}" for one in values) for values in (self.ranks, self.strengths))
        return f"{self.path}: {self.kind}, rank {ranks}, strength {strengths}, on {self.layers} layers: {targets}"
