"""What a model and a reward must offer, and what they may offer beside it.

A class that has the members has the protocol; ``branchtree.plugins.ModelBase`` has most of a model's already.
Axis letters: P prompts, B rows of a batch; ``*latent`` is the shape of one sample's latents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from branchtree.core.scores import Scores
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import (
    Condition,
    Conditioning,
    Footprint,
    LoraSettings,
    LoraSummary,
    ModelCard,
    RewardFootprint,
)


class ModelAdapter(Protocol):
    """A model family. Built from its own configuration; nothing is loaded before ``load``."""

    # Known before loading

    @property
    def modality(self) -> str:
        """What ``decode`` returns: ``"image"``, ``"video"``, or the name of another kind of samples."""

    @property
    def prediction(self) -> str:
        """``"velocity"`` for flow matching; ``"noise"`` or ``"v"`` for variance-preserving models."""

    @property
    def rows_per_prediction(self) -> int:
        """Rows sent through the denoiser for each row predicted: 2 under classifier-free guidance."""

    def footprint(self) -> Footprint:
        """Return the model's sizes, from configuration files alone. Raises ModelError if a named folder is missing."""

    def check(self, condition: Condition) -> None:
        """Refuse a condition that the model cannot take, by a DataError that names it and says what would be right."""

    # Loading

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Load the denoiser to ``device`` in ``denoiser_dtype``; frozen components in ``dtype``, now or when needed.

        Raises ModelError if the folder or hub id cannot be read.
        """

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained."""

    def release_frozen(self) -> None:
        """Move encoders and decoder off the device, until ``encode`` or ``decode`` needs them again."""

    # Sampling

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions: tensors on the CPU with P as first axis, each row independent of the others.

        Rows of different sizes are padded with zeros at their ends: ``predict`` gets them with as many zeros or more.
        """

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Draw one sample's starting latents (*latent) on the CPU: float32, standard normal, or integers."""

    def sigmas(self, steps: int) -> Tensor:
        """Return the model's own time grid, (steps + 1,) float32 from 1 (or near) to 0."""

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Predict for latents (B, *latent) at sigma (B,) under B rows of ``conditioning``; float32.

        The prediction has the latents' shape (B, *latent), or that which the recipe's transition takes.
        Latents come as they are kept, float32 or integers, whatever the run's precision. Rows go through ``denoiser``:
        the adapter's own, that one wrapped for distributed training, or a frozen copy, in the dtype it was loaded in. A
        run that trains float32 weights in bfloat16 calls it under autocast, but never
        with low-rank weights.
        """

    def decode(self, latents: Tensor) -> Samples:
        """Decode clean latents (B, *latent) to B samples. On a CPU, a thread may call ``predict`` meanwhile.

        An adapter whose samples also depend on their conditions has a second parameter ``conditioning``, which may be
        left out. It gets the B rows that ``predict`` got; see ``branchtree.plugins.decoding``.
        """

    # Training

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Freeze the denoiser and put fresh float32 low-rank weights on it, initialised from ``seed``."""

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which ``denoiser`` acts as the model did before LoRA."""

    def enable_gradient_checkpointing(self) -> None:
        """Trade computation for memory in the gradient pass."""

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained weights for ``restore``.

        ``denoiser_state`` holds weights to write in their place: every trainable parameter, by its name in
        ``denoiser``. Raises CheckpointError if they do not fit.
        """

    def restore(self, directory: Path) -> None:
        """Read back, to the bit and before sharding, what ``save`` wrote. Raises CheckpointError if it does not fit."""

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what users of the model's own library load: the complete model, or under LoRA its weights alone."""


# What a model may offer beside it


@runtime_checkable
class NamesItsMedia(Protocol):
    """A model that says which images and videos of a condition it looks at; others may look at all."""

    @property
    def media(self) -> frozenset[str]:
        """Some of ``image``, ``images``, ``last_image`` and ``video``, or none; known before ``load``.

        With ``images`` a condition may hold several; ``check`` is to refuse a number that the model cannot take.
        """


@runtime_checkable
class FingerprintedEncodings(Protocol):
    """A model that can say what its encodings depend on, so that they may be kept on disk."""

    def encoding_fingerprint(self) -> str | None:
        """Digest weights, settings and libraries, but not device and torch: equal ones encode a condition alike.

        None if it cannot be known. Called after ``load``, and does not load encoders.
        """


@runtime_checkable
class DropsEncoders(Protocol):
    """A model that reads its encoders when ``encode`` needs them, and can do without them again."""

    def drop_encoders(self) -> None:
        """Free the encoders' memory on device and host until the next ``encode``."""


@runtime_checkable
class CompilesBlocks(Protocol):
    """A model whose denoiser can be compiled block by block, for ``run.compile``."""

    def compile_blocks(self, denoiser: nn.Module, backend: str) -> None:
        """Compile the repeated blocks of ``denoiser``, the model's own or a copy, with a back-end of torch.compile.

        Called after ``add_lora`` and ``enable_gradient_checkpointing``; nothing is compiled before the first forward.
        """


@runtime_checkable
class Quantizes(Protocol):
    """A model that can keep frozen weights of its denoiser in fewer bits, for ``model.quantize``."""

    @property
    def quantizations(self) -> Collection[str]:
        """The values of ``model.quantize`` that it can be loaded with."""

    def load(
        self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        """Load the model as others are, with its frozen weights in the bits of ``quantize``."""


@runtime_checkable
class FreezesUnused(Protocol):
    """A model that knows which of its weights have no effect: they get no gradient, for which processes would wait."""

    def freeze_unused(self) -> None:
        """Set ``requires_grad`` of those weights to False. Called after that of all was set to True."""


@runtime_checkable
class StartsFromWeights(Protocol):
    """A model that takes weights of another origin than ``save`` for ``model.start``; others ``restore`` them."""

    def start_from(self, source: Path) -> None:
        """Put weights of a file or folder in place of those to be trained, after ``add_lora``, before sharding.

        Precision and the scale of a LoRA may be others. Raises CheckpointError, which says what would fit.
        """


@runtime_checkable
class LoadsLora(Protocol):
    """A model that can take a LoRA file of any common kind, for ``branchtree evaluate --lora``."""

    def load_lora(self, source: Path) -> LoraSummary:
        """Put a LoRA file, or a folder with one, on the loaded model in place of any other LoRA.

        It acts as in the program that the file is for. Raises CheckpointError for a file that is damaged, or has keys
        that fit nothing in the model.
        """


@runtime_checkable
class LocatesWeights(Protocol):
    """A model that can say where its weights are, for the message of a run in which it makes NaN."""

    def weights_of(self, component: str) -> str:
        """Return the files or folder of the ``denoiser``, the ``decoder`` or the ``encoders``, in words."""


@runtime_checkable
class ConvertsLora(Protocol):
    """A model whose LoRA other programs know under names of their own, for ``branchtree export``."""

    def convert_lora(self, source: Path, form: str) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the LoRA that ``export`` wrote, by denoiser, as ``form`` names it: ``kohya`` or ``comfyui``.

        Called before ``load``. Raises CheckpointError, which says what would work, where there are no such names.
        """


@runtime_checkable
class DescribesItself(Protocol):
    """A model that says where it comes from, for the card beside the trained weights."""

    def card(self) -> ModelCard:
        """Return what is known without loading; nothing is fetched."""


# What a reward must offer


class RewardAdapter(Protocol):
    """A scorer of samples. Built from its own configuration; nothing is loaded before ``load``."""

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities that it can score: ``image``, ``video``, or names of other kinds of samples."""

    def load(self, device: torch.device) -> None:
        """Load what scoring needs."""

    def score(self, media: Any, conditions: Sequence[Condition]) -> Scores:
        """Score sample i, of samples of one modality, against condition i, or mark it invalid.

        Called from any thread, never from two at once.
        """


# What a reward may offer beside it


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
        """Return whether samples need a prompt to be scored."""


@runtime_checkable
class ChecksConditions(Protocol):
    """A reward that needs more of a condition than its prompt, and can tell before ``load`` whether it is there."""

    def check(self, condition: Condition) -> None:
        """Refuse a condition that cannot be scored, by a DataError that names it and says what would be right."""


@runtime_checkable
class ReleasesMemory(Protocol):
    """A reward that can leave the device while it has nothing to score."""

    def release(self) -> None:
        """Leave the device, if the reward's settings ask for it, until the next ``score``."""


@runtime_checkable
class SizedReward(Protocol):
    """A reward that can say how much memory its weights take, so that a plan can count them."""

    def footprint(self) -> RewardFootprint | None:
        """Return the memory of its weights, from configuration files alone; None if unknown before loading."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A reward that can say which weights and settings its scores come from."""

    def fingerprint(self) -> str:
        """Digest weights and settings: rewards with equal digests give equal scores. Called after ``load``."""
