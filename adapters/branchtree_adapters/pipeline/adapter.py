"""The part of a model adapter that is the same for every diffusers pipeline with one transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from branchtree.errors import ModelError
from branchtree.plugins import LoraSettings, LoraSummary, weights
from branchtree_adapters.pipeline import sources as shared
from branchtree_adapters.pipeline import speed, trained
from branchtree_adapters.pipeline.components import require_finite_component, require_telling_apart
from branchtree_adapters.pipeline.encoders import EncoderSource, fingerprint
from branchtree_adapters.pipeline.start import load_lora, start_denoiser, start_lora
from branchtree_adapters.pipeline.tokenizers import check_tokenizer, probe_texts


class PipelineAdapter(ABC):
    """Base of the adapters: keeps the loaded pipeline, and adds LoRA to, saves and restores its transformer."""

    frozen_parts: ClassVar[tuple[str, ...]]  # names of the pipeline's encoders and decoder; it may lack some
    encoders: ClassVar[tuple[str, ...]]  # those of them that ``encode`` alone needs: read when it first does
    encoding_parts: ClassVar[tuple[str, ...]]  # folders of all that an encoding depends on
    float32_parts: ClassVar[tuple[str, ...]] = ()  # frozen parts that are in float32 whatever the others are in
    lora_targets: ClassVar[tuple[str, ...]]  # endings of the names of the layers that get LoRA by default

    def __init__(self) -> None:
        self._loaded: Any = None
        self._encoders: EncoderSource | None = None
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

    def _read(self, pipeline: Any, source: shared.ModelSource, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> Any:
        """All of a pipeline, of a diffusers class, but its encoders. Raises ModelError."""
        dtypes = dict.fromkeys(self.float32_parts, torch.float32)
        self._encoders = EncoderSource.of(pipeline, source, dtype, dtypes, self.encoders)
        return shared.load_pipeline(
            pipeline, source, dtype, {**dtypes, "transformer": denoiser_dtype}, self._encoders.names
        )

    def _keep(self, loaded: Any, device: torch.device, denoiser_dtype: torch.dtype) -> None:
        """Take a pipeline that was read: the transformer to ``device``, frozen parts to the CPU until needed."""
        self._loaded, self._device, self._dtype = loaded, device, denoiser_dtype
        shared.own_storage(loaded.transformer, device)
        require_finite_component(loaded.transformer, self._location("transformer"))
        self._own({name: getattr(loaded, name, None) for name in self.frozen_parts})

    def _with_encoders(self) -> Any:
        """The pipeline with its encoders on the device, which are read if they are not there. Raises ModelError."""
        pipeline = self._pipeline
        absent = self._absent_encoders()
        if absent:
            self._own(absent)
            pipeline.register_modules(**absent)
        for name in self._encoders.names if self._encoders else ():
            if getattr(pipeline, name) is not None:
                shared.on_device(getattr(pipeline, name), self._device)
        if absent:
            self._probe_encoders()
        return pipeline

    def _probe_encoders(self) -> None:
        """Encode two texts that differ, and two images. Raises ModelError if an encoder cannot tell them apart."""
        pipeline = self._pipeline
        texts: list[dict[str, str]] = [{}, {}]
        for name in ("tokenizer", "tokenizer_2"):
            if (tokenizer := getattr(pipeline, name, None)) is not None:
                encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
                check_tokenizer(tokenizer, Path(self._location(name)), encoder.config.to_dict())
                for pair, text in zip(texts, probe_texts(tokenizer, Path(self._location(name))), strict=True):
                    pair[name] = text
        first, second = (self._embedded(pair, shade) for pair, shade in zip(texts, (0, 255), strict=True))
        for name, embedding in first.items():
            require_telling_apart(embedding, second[name], self._location(name), texts)

    @abstractmethod
    def _embedded(self, texts: Mapping[str, str], shade: int) -> Mapping[str, Tensor]:
        """What the encoders, by name, make of a text for each tokenizer and of a picture that is grey as ``shade``."""

    def weights_of(self, component: str) -> str:
        """Where the weights of the ``denoiser``, the ``decoder`` or the ``encoders`` are."""
        encoding = [name for name in self.encoding_parts if name in self.frozen_parts]
        names = {"denoiser": ["transformer"], "decoder": ["vae"]}.get(component, encoding)
        return ", ".join(self._location(name) for name in names)

    def _location(self, component: str) -> str:
        """Where a component's files are."""
        return f"{self._encoders.source.location if self._encoders else ''}/{component}"

    def _own(self, parts: Mapping[str, Any]) -> None:
        """Put frozen components that were read into memory of their own on the CPU. Raises ModelError for NaN."""
        for name, part in parts.items():
            if part is not None:
                shared.own_storage(part, torch.device("cpu"))
                require_finite_component(part, self._location(name))
                part.requires_grad_(False)

    def _absent_encoders(self) -> dict[str, Any]:
        """The encoders by name, read from their files, unless the pipeline has them. Raises ModelError."""
        pipeline, source = self._pipeline, self._encoders
        if source is None or any(getattr(pipeline, name) is not None for name in source.names):
            return {}
        return source.read(pipeline.components)

    def drop_encoders(self) -> None:
        """Free the encoders; they are read again if ``encode`` is called again."""
        if self._encoders is not None:
            self._pipeline.register_modules(**dict.fromkeys(self._encoders.names))

    def encoding_fingerprint(self) -> str | None:
        """A digest of the files, settings and libraries that encodings depend on; None if no file is known."""
        if self._encoders is None:
            raise ModelError("the model is not loaded; call load first.")
        dtypes = {f"dtype of {name}": str(dtype) for name, dtype in self._encoders.others.items()}
        settings = {
            "family": type(self).__name__,
            "dtype": str(self._encoders.dtype),
            **dtypes,
            **self._encoding_settings(),
        }
        return fingerprint(self._encoders.source, self.encoding_parts, settings)

    @abstractmethod
    def _encoding_settings(self) -> dict[str, object]:
        """The options that an encoding depends on."""

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
        trained.add_diffusers_lora(self.denoiser, settings, settings.targets or self.lora_targets, seed)

    def without_lora(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``denoiser`` acts without its LoRA. Raises ModelError on entry if it has none."""
        return weights.lora_disabled(denoiser)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self._pipeline.transformer.enable_gradient_checkpointing()

    def compile_blocks(self, denoiser: nn.Module, backend: str) -> None:
        """Compile the blocks of ``denoiser``, each kind once. Raises ModelError for an unknown back-end."""
        speed.compile_blocks(denoiser, backend)

    def save(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained part: ``pytorch_lora_weights.safetensors``, or the whole ``transformer/`` without LoRA.

        ``denoiser_state`` (by trainable-parameter name, all of them) is written in place of the trained weights,
        which stay as they are. Raises CheckpointError if its names or shapes are not the transformer's.
        """
        if weights.has_lora(self.denoiser):
            trained.save_lora(self._pipeline, self.denoiser, directory, denoiser_state, exact=True)
        else:
            trained.with_weights(self.denoiser, denoiser_state).save_pretrained(directory / "transformer")

    def export(self, directory: Path, denoiser_state: Mapping[str, Tensor] | None = None) -> None:
        """Write what a user loads: the LoRA file, or without LoRA a complete pipeline folder. See ``save``.

        The LoRA file gives every reader the trained strength, whether it knows of alpha or not.
        """
        if weights.has_lora(self.denoiser):
            trained.save_lora(self._pipeline, self.denoiser, directory, denoiser_state, exact=False)
        else:
            trained_part = trained.with_weights(self.denoiser, denoiser_state)
            parts = {**self._pipeline.components, **self._absent_encoders(), "transformer": trained_part}
            with shared.no_progress_bars():
                type(self._pipeline)(**parts).save_pretrained(directory)

    def restore(self, directory: Path) -> None:
        """Read back what ``save`` wrote, to the bit, before sharding. Raises CheckpointError if it does not fit."""
        if weights.has_lora(self.denoiser):
            trained.restore_lora(self.denoiser, directory)
        else:
            trained.restore_denoiser(self.denoiser, directory / "transformer")

    def start_from(self, source: Path) -> None:
        """Take up a LoRA's file or folder, or without LoRA a folder of all weights, before sharding.

        Raises CheckpointError if they do not fit.
        """
        if weights.has_lora(self.denoiser):
            start_lora(self.denoiser, source, type(self._pipeline))
        else:
            start_denoiser(self.denoiser, source)

    def load_lora(self, source: Path) -> LoraSummary:
        """Put a LoRA file of any common kind, or the folder of one, on the transformer in place of any other LoRA.

        Raises CheckpointError for one that is damaged, or has keys that fit nothing in the transformer.
        """
        return load_lora(self.denoiser, source, type(self._pipeline))
