"""The part of a model adapter that is the same for every diffusers pipeline with one transformer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from branchtree.errors import ModelError
from branchtree.protocols import LoraSettings
from branchtree_adapters import _diffusers as shared
from branchtree_adapters import _trained as trained


class PipelineAdapter:
    """Base of the adapters: keeps the loaded pipeline, and adds LoRA to, saves and restores its transformer."""

    frozen_parts: ClassVar[tuple[str, ...]]  # names of the pipeline's encoders and decoder; it may lack some
    lora_targets: ClassVar[tuple[str, ...]]  # endings of the names of the layers that get LoRA by default

    def __init__(self) -> None:
        self._loaded: Any = None
        self._device, self._dtype = torch.device("cpu"), torch.float32

    @property
    def _pipeline(self) -> Any:
        if self._loaded is None:
            raise ModelError("the model is not loaded; call load first.")
        return self._loaded

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's transformer. Raises ModelError before ``load``."""
        transformer: nn.Module = self._pipeline.transformer
        return transformer

    def _keep(self, loaded: Any, device: torch.device, denoiser_dtype: torch.dtype) -> None:
        """Take a pipeline that was read: the transformer to ``device``, frozen parts to the CPU until needed."""
        self._loaded, self._device, self._dtype = loaded, device, denoiser_dtype
        shared.own_storage(loaded.transformer, device)
        for part in self._frozen():
            shared.own_storage(part, torch.device("cpu"))
            part.requires_grad_(False)

    def _frozen(self) -> list[Any]:
        parts = [getattr(self._pipeline, name, None) for name in self.frozen_parts]
        return [part for part in parts if part is not None]

    def release_frozen(self) -> None:
        """Move encoders and VAE to the CPU, and give their memory on the device back."""
        if self._device.type == "cpu":
            return
        for part in self._frozen():
            part.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Freeze the transformer and put float32 LoRA weights on it, on ``lora_targets`` unless told otherwise.

        Raises ModelError for a target that names no linear layer.
        """
        trained.add_lora(self.denoiser, settings, settings.targets or self.lora_targets, seed)

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``denoiser`` acts without its LoRA. Raises ModelError on entry if it has none."""
        return trained.lora_disabled(denoiser)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self._pipeline.transformer.enable_gradient_checkpointing()

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained part: ``pytorch_lora_weights.safetensors``, or the whole ``transformer/`` without LoRA.

        ``denoiser_state`` (by trainable-parameter name, all of them) is written in place of the trained weights,
        which stay as they are. Raises CheckpointError if its names or shapes are not the transformer's.
        """
        if trained.has_lora(self.denoiser):
            trained.save_lora(self._pipeline, self.denoiser, directory, denoiser_state)
        else:
            trained.with_weights(self.denoiser, denoiser_state).save_pretrained(directory / "transformer")

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what a user loads: the LoRA file, or without LoRA a complete pipeline folder. See ``save``."""
        if trained.has_lora(self.denoiser):
            self.save(directory, denoiser_state)
        else:
            parts = {**self._pipeline.components, "transformer": trained.with_weights(self.denoiser, denoiser_state)}
            with shared.no_progress_bars():
                type(self._pipeline)(**parts).save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        """Read back what ``save`` wrote, to the bit, before sharding. Raises CheckpointError if it does not fit."""
        if trained.has_lora(self.denoiser):
            trained.restore_lora(self.denoiser, directory)
        else:
            trained.restore_denoiser(self.denoiser, directory / "transformer")
