"""Putting the trained weights of another run, or a LoRA file, into a model that is about to be trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError
from branchtree.plugins import LoraSummary
from branchtree.plugins.weights import has_lora, require_same_shapes, trained_state
from branchtree_adapters.pipeline.lora_file import DOWN, UP, read_lora, read_tensors, require_layers
from branchtree_adapters.pipeline.sources import LORA_FILE

SHOWN = 2


@torch.no_grad()
def start_lora(denoiser: Any, source: Path, pipeline: type[Any]) -> None:
    """Copy a LoRA, a file or the folder of one, into that of ``denoiser``, so that it acts as the file says.

    ``pipeline`` is the class that the denoiser belongs to. The file's precision and alpha may be others. Raises
    CheckpointError, in one message, if it has another rank or lies on other layers.
    """
    from peft import get_peft_model_state_dict

    file = read_lora(source, pipeline)
    live = get_peft_model_state_dict(denoiser, state_dict=trained_state(denoiser, None))
    weights = {f"{name}{DOWN}": layer.down for name, layer in file.layers.items()}
    weights |= {f"{name}{UP}": layer.up for name, layer in file.layers.items()}
    _require_fit(file.path, live, weights)
    config = denoiser.peft_config["default"]
    for name, tensor in live.items():
        value = weights[name].to(tensor.device, torch.float32)
        if name.endswith(UP):
            factor = file.layers[name.removesuffix(UP)].strength / (config.lora_alpha / config.r)
            value = value if factor == 1 else value * factor
        tensor.copy_(value)


@torch.no_grad()
def load_lora(denoiser: Any, source: Path, pipeline: type[Any]) -> LoraSummary:
    """Put a LoRA, a file or the folder of one, on ``denoiser`` in place of any other, frozen.

    B is multiplied by the strength. Raises CheckpointError for one that is damaged or does not fit.
    """
    file = read_lora(source, pipeline)
    if has_lora(denoiser):
        denoiser.unload_lora()
    require_layers(file, denoiser)
    state = {f"{name}{DOWN}": layer.down.float() for name, layer in file.layers.items()}
    state |= {f"{name}{UP}": layer.up.float() * layer.strength for name, layer in file.layers.items()}
    denoiser.load_lora_adapter(state, prefix=None, adapter_name="default")
    denoiser.requires_grad_(False)
    return file.summary()


@torch.no_grad()
def start_denoiser(denoiser: nn.Module, source: Path) -> None:
    """Copy all weights, from a pipeline's folder or its transformer's, into ``denoiser``.

    Their precision may be another. Raises CheckpointError if they do not fit.
    """
    if source.is_file() or (source / LORA_FILE).is_file():
        raise CheckpointError(
            f"'{source}' is a LoRA, or a file that is no whole model, and the recipe trains all weights; add a lora "
            "section, as in lora.rank=8, or name a folder of all weights"
        )
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"'{source}' holds no weights; name a run, a checkpoint, or a folder of a model's weights"
        )
    saved: dict[str, Tensor] = {}
    for file in files:
        saved |= read_tensors(file)[0]
    live = denoiser.state_dict()
    require_same_shapes(f"the weights in '{folder}'", live, saved)
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _require_fit(file: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare names and shapes. Raises CheckpointError that says what to set."""
    problems = []
    for what, names in (
        ("is on layers that the recipe's is not on", sorted(_layers(found) - _layers(wanted))),
        ("lacks layers that the recipe's is on", sorted(_layers(wanted) - _layers(found))),
    ):
        if names:
            problems.append(
                f"it {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}); set lora.targets"
            )
    ranks = {(found[name].shape[0], wanted[name].shape[0]) for name in wanted if name.endswith(DOWN) and name in found}
    for theirs, ours in sorted(ranks):
        if theirs != ours:
            problems.append(f"it has rank {theirs} and lora.rank is {ours}; set lora.rank={theirs}")
    if not problems:
        problems = [
            f"'{name}' has shape {tuple(found[name].shape) if name in found else None} and not {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name not in found or found[name].shape != tensor.shape
        ][:1]
    if problems:
        raise CheckpointError(f"the LoRA '{file}' does not fit: {'; '.join(problems)}")


def _layers(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the layers that have LoRA weights, or whatever else the names stand for."""
    return {name.removesuffix(DOWN).removesuffix(UP) for name in tensors}
