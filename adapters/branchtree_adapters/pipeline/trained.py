"""The trained weights of a pipeline's denoisers, all or a LoRA: saved, restored, and taken from elsewhere.

Files of a pipeline's first denoiser are where they are of its only one. A LoRA of another is in a folder of its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import CheckpointError
from branchtree.plugins import LoraSummary, weights
from branchtree_adapters.pipeline.lora_file import (
    DOWN,
    LORA_FILE,
    METADATA,
    UP,
    LoraFile,
    read_lora,
    require_layers,
    summary_of,
)

SHOWN = 2
State = Mapping[str, Tensor]
"""Trained weights by their names in a denoiser."""
Denoisers = Mapping[str, Any]
"""A pipeline's denoisers by name."""


def save_lora(pipeline: Any, denoisers: Denoisers, states: Mapping[str, State], directory: Path, exact: bool) -> None:
    """Write LoRA weights, by denoiser, as ``pipeline.load_lora_weights`` reads them.

    B is multiplied by the scale, alpha over rank, and the file says that alpha is the rank: readers of the tensors
    alone get the trained strength too. Under ``exact`` a scale that is no power of two, whose product would be rounded,
    stays beside the weights, in the file's metadata.
    """
    for name, folder in _folders(denoisers, directory).items():
        _save_one(pipeline, name, denoisers[name], states[name], folder, exact)


def _folders(denoisers: Denoisers, source: Path) -> dict[str, Path]:
    """Return where each denoiser's LoRA is."""
    first, *others = denoisers
    return {first: source, **{name: source / name for name in others}}


def _save_one(pipeline: Any, name: str, denoiser: Any, state: State, directory: Path, exact: bool) -> None:
    layers, config = _lora_layers(denoiser, state), denoiser.peft_config["default"]
    scale, metadata = config.lora_alpha / config.r, config.to_dict()
    if not exact or math.frexp(scale)[0] == 0.5:
        layers = {name: value * scale if name.endswith(UP) else value for name, value in layers.items()}
        metadata["lora_alpha"] = config.r
    writer, kind = pipeline if hasattr(pipeline, "save_lora_weights") else _plain_writer(), _kind(name)
    given = {f"{kind}_lora_layers": layers, f"{kind}_lora_adapter_metadata": metadata}
    writer.save_lora_weights(directory, **given)


def _kind(name: str) -> str:
    """Return what a denoiser is called in LoRA files."""
    return "unet" if name == "unet" else "transformer"


def _plain_writer() -> Any:
    """Return a class that writes a transformer's LoRA, for pipelines whose class has no LoRA files of its own."""
    from diffusers.loaders import SD3LoraLoaderMixin

    return SD3LoraLoaderMixin


def _lora_layers(denoiser: Any, state: State | None = None) -> dict[str, Tensor]:
    """Return the LoRA weights, or ``state`` in their place, by peft's names in a file."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(denoiser, state_dict=weights.trained_state(denoiser, state)))


@torch.no_grad()
def restore_lora(denoisers: Denoisers, directory: Path) -> None:
    """Read into denoisers what ``save_lora`` wrote. Raises CheckpointError if it is missing or another's."""
    live: dict[str, Tensor] = {}
    scaled: dict[str, Tensor] = {}
    for name, folder in _folders(denoisers, directory).items():
        config, kind = denoisers[name].peft_config["default"], _kind(name)
        saved, metadata = weights.read_safetensors([folder / LORA_FILE])
        try:
            beside = json.loads(metadata.get(METADATA, "{}"))
        except ValueError as error:
            raise CheckpointError(f"cannot read trained weights from '{folder / LORA_FILE}': {error}") from error
        strength = beside.get(f"{kind}.lora_alpha", 1) / beside.get(f"{kind}.r", 1)
        factor = strength / (config.lora_alpha / config.r)
        where = "" if folder == directory else f"{name}/"
        scaled |= {f"{where}{key}": value * factor if key.endswith(UP) else value for key, value in saved.items()}
        live |= {f"{where}{kind}.{key}": tensor for key, tensor in _lora_layers(denoisers[name]).items()}
    weights.copy_exactly(live, scaled, directory)


def with_weights(denoiser: Any, state: State) -> Any:
    """Return a second model like ``denoiser``, with other weights where ``state`` has some; copies no weights."""
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict({**denoiser.state_dict(), **state}, strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def restore_all(denoisers: Denoisers, directory: Path) -> None:
    """Read into denoisers what their save_pretrained wrote to folders of their names. Raises CheckpointError."""
    live: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, denoiser in denoisers.items():
        where = "" if not live else f"{name}/"
        tensors = weights.read_safetensors(sorted((directory / name).glob("*.safetensors")))[0]
        saved |= {f"{where}{key}": tensor for key, tensor in tensors.items()}
        live |= {f"{where}{key}": tensor for key, tensor in denoiser.state_dict().items()}
    weights.copy_exactly(live, saved, directory)


@torch.no_grad()
def start_all(denoisers: Denoisers, source: Path) -> None:
    """Copy all weights, from a pipeline's folder or that of its only denoiser.

    Their precision may be another. Raises CheckpointError if they do not fit.
    """
    if source.is_file() or (source / LORA_FILE).is_file():
        raise CheckpointError(
            f"'{source}' is a LoRA, or a file that is no whole model, and the recipe trains all weights; add a lora "
            "section, as in lora.rank=8, or name a folder of all weights"
        )
    pairs = []
    for name, denoiser in denoisers.items():
        folder = source / name if (source / name).is_dir() or len(denoisers) > 1 else source
        saved = weights.read_safetensors(sorted(folder.glob("*.safetensors")))[0]
        if not saved:
            raise CheckpointError(
                f"'{folder}' holds no weights; name a run, a checkpoint, or a folder of a model's weights"
            )
        live = denoiser.state_dict()
        weights.require_same_shapes(f"the weights in '{folder}'", live, saved)
        pairs += [(tensor, saved[key]) for key, tensor in live.items()]
    for tensor, value in pairs:
        tensor.copy_(value)


@torch.no_grad()
def start_lora(denoisers: Denoisers, source: Path, pipeline: type[Any], unused: Mapping[str, Collection[str]]) -> None:
    """Copy a LoRA, a file or the folder of one, into that of the denoisers, so that it acts as the file says.

    ``pipeline`` is the class that they belong to. The file's precision and alpha may be others, and layers without
    effect, ``unused`` by their names, may be on it. Raises CheckpointError, in one message, if it has
    another rank or lies on other layers.
    """
    pairs = []
    for name, file in read_each(denoisers, source, pipeline).items():
        config = denoisers[name].peft_config["default"]
        scale = config.lora_alpha / config.r
        saved, live = file.tensors(scale), _lora_layers(denoisers[name])
        needless = {f"{layer}{ending}" for layer in unused[name] for ending in (DOWN, UP)} - live.keys()
        saved = {key: value for key, value in saved.items() if key not in needless}
        _require_fit(file.path, live, saved)
        pairs += [(tensor, saved[key]) for key, tensor in live.items()]
    for tensor, value in pairs:
        tensor.copy_(value)


@torch.no_grad()
def load_lora(denoisers: Denoisers, source: Path, pipeline: type[Any]) -> LoraSummary:
    """Put a LoRA, a file or the folder of one, on denoisers in place of any other, frozen.

    B is multiplied by the strength. Raises CheckpointError for one that is damaged or does not fit.
    """
    files = read_each(denoisers, source, pipeline)
    for name, denoiser in denoisers.items():
        if weights.has_lora(denoiser):
            denoiser.unload_lora()
        require_layers(files[name], denoiser)
    for name, denoiser in denoisers.items():
        tensors = files[name].tensors()
        denoiser.load_lora_adapter(tensors, prefix=None, adapter_name="default")
        denoiser.requires_grad_(False)
    return summary_of(list(files.values()))


def read_each(denoisers: Denoisers, source: Path, pipeline: type[Any]) -> dict[str, LoraFile]:
    """Return each denoiser's LoRA. Raises CheckpointError if one is missing or damaged."""
    first, *others = denoisers
    for name in others:
        if not (source / name).is_dir():
            raise CheckpointError(
                f"'{source}' holds no LoRA of {name}, which the model has beside {first}; give a folder that holds "
                f"that of {first}, and in folders of their names that of {' and '.join(others)}"
            )
    return {
        name: read_lora(folder, pipeline, denoisers[name].config if name == "unet" else None)
        for name, folder in _folders(denoisers, source).items()
    }


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
