"""The trained weights of a diffusers transformer, all of them or a LoRA: saved, restored, and taken from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import CheckpointError
from branchtree.plugins import LoraSummary, weights
from branchtree_adapters.pipeline.lora_file import DOWN, LORA_FILE, METADATA, UP, read_lora, require_layers

SHOWN = 2


def save_lora(
    pipeline: Any, denoiser: Any, directory: Path, replacement: Mapping[str, Tensor] | None, exact: bool
) -> None:
    """Write the LoRA weights, or ``replacement``, as ``pipeline.load_lora_weights`` reads them.

    B is multiplied by the scale, alpha over rank, and the file says that alpha is the rank: readers of the tensors
    alone get the trained strength too. Under ``exact`` a scale that is no power of two, whose product would be rounded,
    stays beside the weights, in the file's metadata. Raises CheckpointError if ``replacement`` belongs to another
    model.
    """
    layers, config = _lora_layers(denoiser, replacement), denoiser.peft_config["default"]
    scale, metadata = config.lora_alpha / config.r, config.to_dict()
    if not exact or math.frexp(scale)[0] == 0.5:
        layers = {name: value * scale if name.endswith(UP) else value for name, value in layers.items()}
        metadata["lora_alpha"] = config.r
    writer = pipeline if hasattr(pipeline, "save_lora_weights") else _plain_writer()
    writer.save_lora_weights(directory, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)


def _plain_writer() -> Any:
    """Return a class that writes a transformer's LoRA, for pipelines whose class has no LoRA files of its own."""
    from diffusers.loaders import SD3LoraLoaderMixin

    return SD3LoraLoaderMixin


def _lora_layers(denoiser: Any, replacement: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the LoRA weights, or ``replacement`` in their place, by peft's names in a file."""
    from peft import get_peft_model_state_dict

    state = weights.trained_state(denoiser, replacement)
    return dict(get_peft_model_state_dict(denoiser, state_dict=state))


@torch.no_grad()
def restore_lora(denoiser: Any, directory: Path) -> None:
    """Read into ``denoiser`` what ``save_lora`` wrote. Raises CheckpointError if it is missing or another's."""
    config = denoiser.peft_config["default"]
    saved, metadata = weights.read_safetensors([directory / LORA_FILE])
    try:
        beside = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"cannot read trained weights from '{directory / LORA_FILE}': {error}") from error
    strength = beside.get("transformer.lora_alpha", 1) / beside.get("transformer.r", 1)
    factor = strength / (config.lora_alpha / config.r)
    scaled = {name: value * factor if name.endswith(UP) else value for name, value in saved.items()}
    live = {f"transformer.{name}": tensor for name, tensor in _lora_layers(denoiser).items()}
    weights.copy_exactly(live, scaled, directory)


def with_weights(denoiser: Any, replacement: Mapping[str, Tensor] | None) -> Any:
    """Return a second model like ``denoiser``, with ``replacement`` for its trained weights; copies no weights.

    Raises CheckpointError if ``replacement`` belongs to another model.
    """
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    state = {**denoiser.state_dict(), **weights.trained_state(denoiser, replacement)}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def restore_all(denoiser: Any, folder: Path) -> None:
    """Read into ``denoiser`` what its save_pretrained wrote to ``folder``. Raises CheckpointError likewise."""
    weights.copy_exactly(
        denoiser.state_dict(), weights.read_safetensors(sorted(folder.glob("*.safetensors")))[0], folder
    )


@torch.no_grad()
def start_all(denoiser: Any, source: Path) -> None:
    """Copy all weights, from a pipeline's folder or its transformer's, into ``denoiser``.

    Their precision may be another. Raises CheckpointError if they do not fit.
    """
    if source.is_file() or (source / LORA_FILE).is_file():
        raise CheckpointError(
            f"'{source}' is a LoRA, or a file that is no whole model, and the recipe trains all weights; add a lora "
            "section, as in lora.rank=8, or name a folder of all weights"
        )
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    saved = weights.read_safetensors(sorted(folder.glob("*.safetensors")))[0]
    if not saved:
        raise CheckpointError(
            f"'{source}' holds no weights; name a run, a checkpoint, or a folder of a model's weights"
        )
    live = denoiser.state_dict()
    weights.require_same_shapes(f"the weights in '{folder}'", live, saved)
    for name, tensor in live.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def start_lora(denoiser: Any, source: Path, pipeline: type[Any]) -> None:
    """Copy a LoRA, a file or the folder of one, into that of ``denoiser``, so that it acts as the file says.

    ``pipeline`` is the class that the denoiser belongs to. The file's precision and alpha may be others. Raises
    CheckpointError, in one message, if it has another rank or lies on other layers.
    """
    file, config = read_lora(source, pipeline), denoiser.peft_config["default"]
    scale = config.lora_alpha / config.r
    saved = file.tensors(lambda layer: layer.strength / scale)
    live = _lora_layers(denoiser)
    _require_fit(file.path, live, saved)
    for name, tensor in live.items():
        tensor.copy_(saved[name])


@torch.no_grad()
def load_lora(denoiser: Any, source: Path, pipeline: type[Any]) -> LoraSummary:
    """Put a LoRA, a file or the folder of one, on ``denoiser`` in place of any other, frozen.

    B is multiplied by the strength. Raises CheckpointError for one that is damaged or does not fit.
    """
    file = read_lora(source, pipeline)
    if weights.has_lora(denoiser):
        denoiser.unload_lora()
    require_layers(file, denoiser)
    denoiser.load_lora_adapter(file.tensors(lambda layer: layer.strength), prefix=None, adapter_name="default")
    denoiser.requires_grad_(False)
    return file.summary()


def _require_fit(file: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare names and shapes. Raises CheckpointError that says what to set."""
    theirs, ours = ({name.removesuffix(DOWN).removesuffix(UP) for name in each} for each in (found, wanted))
    problems = []
    for what, names in (
        ("is on layers that the recipe's is not on", sorted(theirs - ours)),
        ("lacks layers that the recipe's is on", sorted(ours - theirs)),
    ):
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            problems.append(f"it {what} ({', '.join(names[:SHOWN])}{more}); set lora.targets")
    ranks = {(len(found[name]), len(wanted[name])) for name in wanted if name.endswith(DOWN) and name in found}
    for rank in (rank for rank, own in sorted(ranks) if rank != own):
        own = next(len(value) for name, value in wanted.items() if name.endswith(DOWN))
        problems.append(f"it has rank {rank} and lora.rank is {own}; set lora.rank={rank}")
    if not problems:
        shapes = ((name, found.get(name), value) for name, value in wanted.items())
        problems = [
            f"'{name}' has shape {None if other is None else tuple(other.shape)} and not {tuple(value.shape)}"
            for name, other, value in shapes
            if other is None or other.shape != value.shape
        ][:1]
    if problems:
        raise CheckpointError(f"the LoRA '{file}' does not fit: {'; '.join(problems)}")
