"""Base classes of plug-ins: a model writes what is its own, a callback what it is interested in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError, ModelError
from branchtree.plugins import weights
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Condition, Conditioning, Footprint, LoraSettings

DENOISER_FILE = "denoiser.safetensors"
LORA_FILE = "lora.safetensors"
FIRST_WEIGHTS = 0
"""The seed of weights that are read from no file."""


class ModelBase(ABC):
    """A model whose denoiser is one torch module.

    A plug-in writes ``modality``, ``latent_shape``, ``build_denoiser``, ``encode``, ``predict`` and ``decode``. All
    else has a default that it may override: flow matching on an even grid, no guidance, no frozen components, any
    prompt and no media in a condition, LoRA on every linear layer, and weights in safetensors files. If the
    configuration has a field ``path``, it names a folder that ``export`` wrote, or is None.
    """

    prediction = "velocity"
    rows_per_prediction = 1
    media: frozenset[str] = frozenset()
    lora_targets: tuple[str, ...] | None = None
    """Endings of the names of the linear layers that get LoRA; None: of all."""

    def __init__(self, config: Any) -> None:
        self.config: Any = config
        self._denoiser: nn.Module | None = None

    @property
    @abstractmethod
    def modality(self) -> str:
        """What ``decode`` returns: ``"image"``, ``"video"`` or another kind's name. A class attribute will do."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample's latents. A class attribute will do."""

    @property
    def tokens(self) -> int:
        """Positions of one sample that go through the same weights, as a transformer's patches do."""
        return 1

    @abstractmethod
    def build_denoiser(self) -> nn.Module:
        """Return a new denoiser, with its first weights, in float32. It is also called on torch's meta device."""

    @abstractmethod
    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P conditions: named float tensors on the CPU with P as first axis, each row for itself."""

    @abstractmethod
    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Predict for latents (B, *latent) at sigma (B,), float32, through ``denoiser`` or ``self.denoiser``."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Samples:
        """Decode clean latents (B, *latent) to B samples.

        A model whose samples also depend on their conditions adds ``conditioning: Conditioning | None = None``, B rows.
        """

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained. Raises ModelError before ``load``."""
        if self._denoiser is None:
            raise ModelError("the model is not loaded; call load first")
        return self._denoiser

    def check(self, condition: Condition) -> None:  # noqa: B027 - a default, not a gap
        """Refuse a condition that the model cannot take, by a DataError. The default takes any prompt."""

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Build the denoiser, and read its weights from ``path``, if any. Raises ModelError if they cannot be read.

        Weights that are not read are drawn from a seed of their own: every process, and a run that is resumed, has the
        same ones.
        """
        file = self._weights_file()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FIRST_WEIGHTS)
            denoiser = self.build_denoiser()
        if file is not None:
            try:
                denoiser.load_state_dict(weights.read_safetensors([file])[0])
            except (CheckpointError, RuntimeError) as error:
                raise ModelError(f"model.path: '{file}' holds no weights of this model: {error}") from error
        self._denoiser = denoiser.to(device, denoiser_dtype)

    def _weights_file(self) -> Path | None:
        path = getattr(self.config, "path", None)
        if path is None:
            return None
        file = Path(path) / DENOISER_FILE
        if not file.is_file():
            raise ModelError(f"model.path: no model in '{path}'; name a folder that holds {DENOISER_FILE}")
        return file

    def footprint(self) -> Footprint:
        """Return the sizes of the model, without its weights. Raises ModelError if ``path`` names no model."""
        self._weights_file()
        with torch.device("meta"):
            return self.sizes(self.build_denoiser())

    def sizes(self, denoiser: nn.Module) -> Footprint:
        """Count parameters, and estimate a row's work as if each weight were used once for each of its ``tokens``.

        Override it where that is far off, for a denoiser on torch's meta device.
        """
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        outputs = sum(layer.out_features for layer in denoiser.modules() if isinstance(layer, nn.Linear))
        numbers = outputs * self.tokens + 4 * torch.Size(self.latent_shape).numel()
        return Footprint(
            denoiser_parameters=parameters,
            frozen_parameters=0,
            latent_shape=tuple(self.latent_shape),
            activation_numbers_per_row=numbers,
            checkpointed_numbers_per_row=numbers,
            forward_flops_per_row=2.0 * parameters * self.tokens,
            rows_per_prediction=self.rows_per_prediction,
            lora_parameters_per_rank=weights.lora_parameters_per_rank(denoiser, self._lora_targets(denoiser)),
            source="counted on the denoiser, each weight used once a token",
        )

    def _lora_targets(self, denoiser: nn.Module) -> Sequence[str]:
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        return self.lora_targets or linear

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Put LoRA on the settings' targets, or ``lora_targets``. Raises ModelError for one that is no linear layer."""
        weights.add_lora(self.denoiser, settings, settings.targets or self._lora_targets(self.denoiser), seed)

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which ``denoiser`` acts without its LoRA. On entry, raises ModelError if it has none."""
        return weights.lora_disabled(denoiser)

    def enable_gradient_checkpointing(self) -> None:
        """Trade computation for memory in the gradient pass, where the denoiser has a method of this name."""
        enable = getattr(self.denoiser, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable()

    def release_frozen(self) -> None:  # noqa: B027 - a default, not a gap
        """Move encoders and decoder off the device. By default there are none."""

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Return one sample's starting latents (*latent), standard normal."""
        return torch.randn(self.latent_shape, generator=generator)

    def sigmas(self, steps: int) -> Tensor:
        """Return an even grid from 1 to 0, (steps + 1,)."""
        return torch.linspace(1, 0, steps + 1)

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write ``denoiser.safetensors``, or under LoRA ``lora.safetensors``; see ModelAdapter."""
        from safetensors.torch import save_file

        state, file = weights.trained_state(self.denoiser, denoiser_state), LORA_FILE
        if not weights.has_lora(self.denoiser):
            state, file = {**self.denoiser.state_dict(), **state}, DENOISER_FILE
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, directory / file)

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what ``path`` reads, or under LoRA the low-rank weights; see ``save``."""
        self.save(directory, denoiser_state)

    def restore(self, directory: Path) -> None:
        """Read back, to the bit, what ``save`` wrote. Raises CheckpointError if it does not fit."""
        live, file = self.denoiser.state_dict(), DENOISER_FILE
        if weights.has_lora(self.denoiser):
            live, file = weights.trained_state(self.denoiser, None), LORA_FILE
        weights.copy_exactly(live, weights.read_safetensors([directory / file])[0], directory)


class Callback:
    """Follows a run, on the main process. Override what is of interest; an exception ends the run."""

    def on_start(self, output: Path, iteration: int, iterations: int) -> None:
        """Run before the first iteration of this process, when ``iteration`` of ``iterations`` are done."""

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Run after an iteration and its optimiser steps."""

    def on_samples(self, iteration: int, samples: Sequence[Samples], conditions: Sequence[Condition]) -> None:
        """Run when ``run.sample_every`` has samples made, in batches, one for each condition."""

    def on_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Run after an evaluation, when ``iteration`` iterations were done."""

    def on_end(self, output: Path) -> None:
        """Run after the last iteration, when ``final/`` has been written."""
