"""The ``guest_gaussian`` model: images of a prompt are Gaussian around a mean that depends on the prompt's words."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from branchtree.errors import CheckpointError, ModelError
from branchtree.plugins.protocols import Condition, Conditioning, Footprint, LoraSettings, Media

WORDS = 16  # buckets that the words of a prompt are hashed into
LATENT = (3, 4, 4)  # an RGB image of 4x4 pixels
WEIGHTS = "denoiser.safetensors"


class GuestGaussianConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``path`` is a folder that a run exported, or none for fresh weights; ``spread`` the images' deviation."""

    path: Path | None = None
    spread: float = pydantic.Field(default=0.5, gt=0)


class GaussianDenoiser(nn.Module):
    """The exact velocity of the flow from noise to N(mean(words), spread^2 I)."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.mean = nn.Linear(WORDS, torch.Size(LATENT).numel())
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)

    def forward(self, latents: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        """E[noise - image | latents] of latents (B, *LATENT) = (1 - sigma) image + sigma noise."""
        level, mean = sigma.view(-1, 1, 1, 1), self.mean(words.to(self.mean.weight)).view(-1, *LATENT)
        variance = ((1 - level) * self.spread) ** 2 + level**2
        residual = (latents - (1 - level) * mean) / variance
        velocity: Tensor = (level - (1 - level) * self.spread**2) * residual - mean
        return velocity


class GuestGaussian:
    """A model family whose latents are its images."""

    modality = "image"
    prediction = "velocity"
    rows_per_prediction = 1

    def __init__(self, config: GuestGaussianConfig) -> None:
        self.config = config
        self._denoiser: GaussianDenoiser | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained. Raises ModelError before ``load``."""
        if self._denoiser is None:
            raise ModelError("the model is not loaded; call load first")
        return self._denoiser

    def footprint(self) -> Footprint:
        """Sizes without weights. Raises ModelError if ``path`` names no model."""
        self._weights()
        size = torch.Size(LATENT).numel()
        return Footprint(
            denoiser_parameters=(WORDS + 1) * size,
            frozen_parameters=0,
            latent_shape=LATENT,
            activation_numbers_per_row=4 * size,
            checkpointed_numbers_per_row=4 * size,
            forward_flops_per_row=2.0 * WORDS * size,
            rows_per_prediction=self.rows_per_prediction,
            lora_parameters_per_rank=0,
            source="the guest's code",
        )

    def _weights(self) -> Path | None:
        """The file to load, or None for fresh weights."""
        if self.config.path is None:
            return None
        file = self.config.path / WEIGHTS
        if not file.is_file():
            raise ModelError(f"model.path: no model in '{self.config.path}'; name a folder that holds {WEIGHTS}")
        return file

    def check(self, condition: Condition) -> None:
        """Any prompt will do."""

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Make the denoiser, and read its weights where a path is given."""
        file, denoiser = self._weights(), GaussianDenoiser(self.config.spread)
        self._denoiser = denoiser.to(device, denoiser_dtype)
        if file is not None:
            _copy(file, self._denoiser, ModelError)

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Refuse: there is nothing here worth a low-rank update."""
        raise ModelError("guest_gaussian takes no LoRA; leave the recipe's lora section out")

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Refuse, as ``add_lora`` does."""
        raise ModelError("guest_gaussian takes no LoRA")

    def enable_gradient_checkpointing(self) -> None:
        """Nothing: one linear layer keeps nothing worth computing again."""

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """How often each bucket's words occur, (P, WORDS)."""
        words = torch.zeros(len(conditions), WORDS)
        for row, condition in enumerate(conditions):
            for word in condition.prompt.lower().split():
                words[row, zlib.crc32(word.encode()) % WORDS] += 1
        return {"words": words}

    def release_frozen(self) -> None:
        """Nothing: no part is frozen."""

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Starting latents of one image."""
        return torch.randn(LATENT, generator=generator)

    def sigmas(self, steps: int) -> Tensor:
        """An even grid from 1 to 0."""
        return torch.linspace(1, 0, steps + 1)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The velocity of latents (B, *LATENT) at sigma (B,)."""
        velocity: Tensor = (denoiser or self.denoiser)(latents, sigma.to(latents), conditioning["words"])
        return velocity.float()

    def decode(self, latents: Tensor) -> Media:
        """Latents as images: 0 is grey."""
        return Media(images=(latents.float() / 4 + 0.5).clamp(0, 1))

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the weights, or ``denoiser_state`` in their place."""
        own = self.denoiser.state_dict()
        state = own if denoiser_state is None else denoiser_state
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
            raise CheckpointError(f"these are not the weights of a guest_gaussian: {', '.join(state)}")
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, directory / WEIGHTS)

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what ``path`` reads: the weights are the whole model."""
        self.save(directory, denoiser_state)

    def restore(self, directory: Path) -> None:
        """Read back what ``save`` wrote."""
        _copy(directory / WEIGHTS, self.denoiser, CheckpointError)


def _copy(file: Path, denoiser: nn.Module, error: type[ModelError] | type[CheckpointError]) -> None:
    try:
        denoiser.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as cause:
        raise error(f"{file}: holds no weights of a guest_gaussian: {cause}") from cause
