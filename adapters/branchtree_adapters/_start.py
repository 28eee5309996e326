"""Putting the trained weights of another run, or a LoRA file, into a model that is about to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError
from branchtree_adapters import _trained as trained
from branchtree_adapters._diffusers import LORA_FILE

PREFIX, DOWN, UP, ALPHA = "transformer.", ".lora_A.weight", ".lora_B.weight", ".alpha"
METADATA = "lora_adapter_metadata"
SHOWN = 2


@torch.no_grad()
def start_lora(denoiser: Any, source: Path) -> None:
    """Copy a LoRA, a file or the folder of one, into that of ``denoiser``, so that it acts as the file says.

    Its precision and alpha may be others. Raises CheckpointError, in one message, if it has another rank or lies on
    other layers.
    """
    from peft import get_peft_model_state_dict

    file = source if source.is_file() else source / LORA_FILE
    if not file.is_file():
        whole = any(source.glob("transformer/*.safetensors"))
        remedy = "name the folder of a whole model as model.path instead" if whole else "name a LoRA's file or folder"
        raise CheckpointError(f"'{source}' holds no {LORA_FILE}, and the recipe trains a LoRA; {remedy}")
    saved, metadata = _read(file)
    live = get_peft_model_state_dict(denoiser, state_dict=trained.trained_state(denoiser, None))
    wanted = {f"{PREFIX}{name}": tensor for name, tensor in live.items()}
    weights = {name: value for name, value in saved.items() if not name.endswith(ALPHA)}
    _require_fit(file, wanted, weights)
    config = denoiser.peft_config["default"]
    for name, tensor in wanted.items():
        value = weights[name].to(tensor.device, torch.float32)
        if name.endswith(UP):
            layer = name.removesuffix(UP)
            rank = value.shape[1]
            alpha = float(saved.get(f"{layer}{ALPHA}", metadata.get(f"{PREFIX}lora_alpha", rank)))
            factor = (alpha / rank) / (config.lora_alpha / config.r)
            value = value if factor == 1 else value * factor
        tensor.copy_(value)


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
        saved |= _read(file)[0]
    live = denoiser.state_dict()
    trained.require_same(f"the weights in '{folder}'", live, saved)
    for name, tensor in live.items():
        tensor.copy_(saved[name])


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return a file's tensors, and what it says of its LoRA."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
        return load_file(file), metadata
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read trained weights from '{file}': {error}") from error


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
    return {name.removesuffix(DOWN).removesuffix(UP).removeprefix(PREFIX) for name in tensors}
