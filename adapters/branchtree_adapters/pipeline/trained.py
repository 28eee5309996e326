"""The trained part of a diffusers pipeline, its transformer or LoRA weights on it: making, saving and restoring."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from branchtree.errors import CheckpointError
from branchtree.plugins import LoraSettings, weights
from branchtree_adapters.pipeline.sources import LORA_FILE, on_meta


def add_diffusers_lora(denoiser: Any, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Freeze a diffusers model and put LoRA weights on ``targets`` as diffusers does. Raises ModelError."""
    weights.add_lora(denoiser, settings, targets, seed, inject=denoiser.add_adapter)


def save_lora(
    pipeline: Any, denoiser: Any, directory: Path, replacement: Mapping[str, Tensor] | None, exact: bool
) -> None:
    """Write the LoRA weights, or ``replacement``, as ``pipeline.load_lora_weights`` reads them.

    B is multiplied by the scale, alpha over rank, and the file says that alpha is the rank: readers of the tensors
    alone get the trained strength too. Under ``exact`` a scale that is no power of two, whose product would be rounded,
    stays beside the weights, in the file's metadata. Raises CheckpointError if ``replacement`` belongs to another
    model.
    """
    from peft import get_peft_model_state_dict

    config = denoiser.peft_config["default"]
    layers = get_peft_model_state_dict(denoiser, state_dict=weights.trained_state(denoiser, replacement))
    scale, metadata = config.lora_alpha / config.r, config.to_dict()
    if not exact or math.frexp(scale)[0] == 0.5:
        layers = {name: value * scale if _is_output(name) else value for name, value in layers.items()}
        metadata["lora_alpha"] = config.r
    pipeline.save_lora_weights(directory, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


def _is_output(name: str) -> bool:
    """Whether a LoRA weight is B, the one that is applied last."""
    return ".lora_B." in name


def with_weights(denoiser: Any, replacement: Mapping[str, Tensor] | None) -> Any:
    """A second model like ``denoiser``, with ``replacement`` in place of its trained weights; copies no weights.

    Raises CheckpointError if ``replacement`` belongs to another model.
    """
    twin = on_meta(lambda: type(denoiser).from_config(denoiser.config))
    state = {**denoiser.state_dict(), **weights.trained_state(denoiser, replacement)}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def restore_lora(denoiser: Any, directory: Path) -> None:
    """Read into ``denoiser`` what ``save_lora`` wrote. Raises CheckpointError if it is missing or another's."""
    from peft import get_peft_model_state_dict

    file, config = directory / LORA_FILE, denoiser.peft_config["default"]
    live = get_peft_model_state_dict(denoiser, state_dict=weights.trained_state(denoiser, None))
    named = {f"transformer.{name}": tensor for name, tensor in live.items()}
    factor = _scale_beside(file) / (config.lora_alpha / config.r)
    weights.copy_exactly(named, [file], {name: factor for name in named if _is_output(name)})


def _scale_beside(file: Path) -> float:
    """Alpha over rank by the metadata of a LoRA file; 1 where it says nothing. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            found = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read trained weights from '{file}': {error}") from error
    return float(found.get("transformer.lora_alpha", 1) / found.get("transformer.r", 1))


def restore_denoiser(denoiser: nn.Module, folder: Path) -> None:
    """Read into ``denoiser`` what its save_pretrained wrote to ``folder``. Raises CheckpointError likewise."""
    weights.copy_exactly(denoiser.state_dict(), sorted(folder.glob("*.safetensors")))
