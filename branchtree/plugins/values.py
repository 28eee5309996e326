"""The values that pass between the library and its plug-ins: conditions, sizes, settings.

Axis letter: P prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from branchtree.errors import DataError, shortened

Conditioning = Mapping[str, Tensor]
"""Encoded conditions of P prompts: named tensors whose first axis is P. Rows may have zeros at their ends."""


Fields = TypeVar("Fields", bound=BaseModel)


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

    def read(self, kind: type[Fields]) -> Fields:
        """Return the metadata as a pydantic model, a plug-in's own. Raises DataError that names each key at fault."""
        try:
            return kind.model_validate(dict(self.metadata))
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, each['loc'])) or 'metadata'}: {each['msg']}"
                for each in error.errors(include_url=False, include_input=False)
            ]
            raise DataError(f"{self}: {'; '.join(problems)}") from None

    @property
    def metadata_text(self) -> str:
        """The metadata as JSON with sorted keys, by which conditions can be distinguished."""
        return json.dumps(self.metadata, sort_keys=True, default=str)

    def __str__(self) -> str:
        """Return what a message calls it: where it was read, and its prompt."""
        prompt = shortened(self.prompt)
        return f"{self.location}: '{prompt}'" if self.location else f"'{prompt}'"


@dataclass(frozen=True)
class RewardCard:
    """What a user should know of a reward before using it; ``branchtree rewards`` lists it."""

    modalities: frozenset[str]  # none for a reward that takes any kind of samples
    checkpoint: str  # hub id and file, or "none"
    size: int | None  # bytes to download; None if not known
    licence: str  # of the weights
    non_commercial: bool | None  # whether the licence forbids commercial use; None where it depends
    source: str  # paper, repository or model card


@dataclass(frozen=True)
class ModelCard:
    """What the card of a trained model says of the model that it was trained from."""

    base: str | None  # its hub id; None for a local model
    licence: str  # of its weights, in words
    library: str  # that reads what ``export`` writes


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
class QuantizableFootprint:
    """Sizes of the linear layers of a denoiser whose weights ``model.quantize`` can keep in fewer bits."""

    parameters: int  # of their weights
    rows: int  # of their weights, one for each output
    largest: int  # parameters of the largest


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
    quantizable: QuantizableFootprint | None = None  # None if no layer can be quantised
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
