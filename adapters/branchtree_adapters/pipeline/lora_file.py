"""LoRA files of every common kind, read as one: per layer A, B and the strength of their product."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError, shortened
from branchtree.files.json_lines import parse_json, read_json_object
from branchtree.plugins import LoraSummary
from branchtree.plugins.weights import read_safetensors
from branchtree_adapters.pipeline.denoisers import DENOISERS

LORA_FILE = "pytorch_lora_weights.safetensors"
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
PREFIXES = re.compile(r"^(transformer|unet)\.")
METADATA = "lora_adapter_metadata"
PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""peft's ways to begin a LoRA that leave the model's own weights alone."""
SHOWN = 3
Sizes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of linear layers by name."""


@dataclass(frozen=True)
class LoraLayer:
    """What is added to a linear layer's weight: strength * up @ down."""

    down: Tensor  # A (rank, in)
    up: Tensor  # B (out, rank)
    strength: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.down)


@dataclass(frozen=True)
class LoraFile:
    """A file's layers by their names in the denoiser."""

    path: Path
    kind: str
    layers: Mapping[str, LoraLayer]
    strengths: tuple[float, ...]  # as the file says, ascending; a converter multiplies them into A and B

    def tensors(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return A, and B for a LoRA whose product is multiplied by ``scale``, by their names in diffusers' files.

        They are float32.
        """
        downs = {f"{name}{DOWN}": layer.down.float() for name, layer in self.layers.items()}
        return downs | {
            f"{name}{UP}": layer.up.float() * (layer.strength / scale) for name, layer in self.layers.items()
        }


def summary_of(files: Sequence[LoraFile]) -> LoraSummary:
    """Return ranks, strengths and targets of a pipeline's LoRA files, for a person."""
    layers = [(name, layer) for file in files for name, layer in file.layers.items()]
    endings = Counter(re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name, _ in layers)
    return LoraSummary(
        path=str(files[0].path),
        kind=files[0].kind,
        layers=len(layers),
        ranks=tuple(sorted({layer.rank for _, layer in layers})),
        strengths=tuple(sorted({strength for file in files for strength in file.strengths})),
        targets=dict(sorted(endings.items())),
    )


def read_lora(source: Path, pipeline: type[Any], unet: Any = None) -> LoraFile:
    """Read a LoRA file, or the folder of one.

    Args:
        source: A safetensors file or a folder: as diffusers and this library write them, a folder of peft's, or a file
            with the keys of kohya's scripts, ComfyUI or another program that diffusers can convert.
        pipeline: The diffusers class whose converter knows the other programs' names.
        unet: The configuration of a U-Net, by which its converter numbers blocks.

    Raises:
        CheckpointError: There is no such file, or it is damaged, or holds what is no LoRA.
    """
    file, config = _find(source)
    tensors, texts = read_safetensors([file])
    metadata = parse_json(texts.get(METADATA, "{}"), f"{file}: its metadata '{METADATA}'", CheckpointError)
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: its metadata '{METADATA}' is not a JSON object")
    if config is not None:
        settings = read_json_object(config, CheckpointError)
        kind, named = "peft adapter", {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}
    elif all(name.endswith((DOWN, UP, ALPHA)) and not _is_foreign(name) for name in tensors):
        kind, named = "diffusers", tensors
        settings = {PREFIXES.sub("", name): value for name, value in metadata.items()}
    else:
        kind, named, settings = "converted by diffusers", _converted(file, tensors, pipeline, unet), {}
    layers = _layers(file, {PREFIXES.sub("", name): value for name, value in named.items()}, settings)
    strengths = {layer.strength for layer in layers.values()} if named is tensors or config else _alphas(tensors)
    return LoraFile(file, kind, layers, tuple(sorted(strengths)))


def linear_sizes(denoiser: nn.Module) -> Sizes:
    """Return outputs and inputs of the linear layers of ``denoiser``, by name."""
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def require_layers(file: LoraFile, denoiser: nn.Module) -> None:
    """Raise CheckpointError for layers that ``denoiser`` lacks, or has in another size."""
    problems = []
    sizes = linear_sizes(denoiser)
    for name, layer in file.layers.items():
        size = (layer.up.shape[0], layer.down.shape[1])
        if name not in sizes:
            problems.append(f"'{name}' (no such linear layer)")
        elif size != sizes[name]:
            problems.append(f"'{name}' (of size {size}, the model's is {sizes[name]})")
    _refuse(file.path, problems, "does not fit the model")


def _find(source: Path) -> tuple[Path, Path | None]:
    """Return the file of weights, and peft's configuration where there is one."""
    folder = source if source.is_dir() else source.parent
    file = source
    if source.is_dir():
        file = next((folder / name for name in (LORA_FILE, PEFT_FILE) if (folder / name).is_file()), source)
        if not file.is_file():
            whole = any(any(source.glob(f"{name}/*.safetensors")) for name in DENOISERS)
            named = "the folder of a whole model as model.path instead" if whole else "a LoRA's file or folder"
            raise CheckpointError(f"'{source}' holds no {LORA_FILE} and no {PEFT_FILE}; name {named}")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"'{file}' is no .safetensors file; LoRA weights are read from those alone")
    config = folder / PEFT_CONFIG
    if file.name == PEFT_FILE and not config.is_file():
        raise CheckpointError(f"'{file}' has no {PEFT_CONFIG} beside it, which says how strong it is")
    return file, config if file.name == PEFT_FILE else None


def _is_foreign(name: str) -> bool:
    """Return whether a key is one of a program that names layers in another way than diffusers."""
    return name.startswith(("diffusion_model.", "lora_", PEFT_PREFIX))


def _converted(file: Path, tensors: Mapping[str, Tensor], pipeline: type[Any], unet: Any) -> dict[str, Tensor]:
    """Return the weights under diffusers' names, their alphas multiplied in or, for a U-Net's, beside them.

    Raises CheckpointError for lost keys.

    diffusers' converters drop what they do not know with no more than a log line, or none. So they are run on weights
    with gradients: one that nothing came of has none.
    """
    leaves = {name: value.float().requires_grad_() for name, value in tensors.items() if not name.endswith(ALPHA)}
    try:
        with torch.enable_grad():
            given = {name: leaves[name] * 1 if name in leaves else value for name, value in tensors.items()}
            converted, alphas = _by_diffusers(given, pipeline, unet)
            made = [value for value in converted.values() if value.requires_grad]
            found = torch.autograd.grad([value.sum() for value in made], list(leaves.values()), allow_unused=True)
    except Exception as error:  # the converters assert, and index, and raise many kinds
        reason = shortened(" ".join(str(error).split())) or type(error).__name__
        raise CheckpointError(f"'{file}' has keys of no LoRA that diffusers knows for this model: {reason}") from error
    used = {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    lost = [
        f"'{name}'" for name, value in leaves.items() if name not in used and bool(value.any())
    ]  # zeros add nothing
    modules = _ranks(tensors)
    lost += [f"'{name}'" for name in tensors if name.endswith(ALPHA) and name.removesuffix(ALPHA) not in modules]
    lost += [f"'{name}'" for name in converted if name.endswith(ALPHA)]  # which its reader would not look at
    _refuse(file, lost, "holds keys that fit nothing in the model")
    return {**{name: value.detach() for name, value in converted.items()}, **alphas}


def _by_diffusers(
    given: Mapping[str, Tensor], pipeline: type[Any], unet: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights that the pipeline's converter makes of a file's, and the alphas that it leaves beside them."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    if unet is None:
        return pipeline.lora_state_dict(given), {}
    converted, alphas = pipeline.lora_state_dict(given, unet_config=unet)
    beside = {
        name.partition(".lora_A.")[0].removesuffix(ALPHA) + ALPHA: torch.as_tensor(value)
        for name, value in convert_unet_state_dict_to_peft(alphas or {}).items()
    }
    return convert_unet_state_dict_to_peft(converted), beside


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of each module of a file that is yet to be converted."""
    downs = (DOWN, ".lora_down.weight", ".lora.down.weight")
    return {
        name.removesuffix(end): len(value) for name, value in tensors.items() for end in downs if name.endswith(end)
    }


def _alphas(tensors: Mapping[str, Tensor]) -> set[float]:
    """Return the strengths that such a file states, 1 where it states none."""
    alphas = {name.removesuffix(ALPHA): float(value) for name, value in tensors.items() if name.endswith(ALPHA)}
    return {alphas.get(name, rank) / rank for name, rank in _ranks(tensors).items()}


def _layers(file: Path, named: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, LoraLayer]:
    """Return the layers of weights under diffusers' names, with peft's ``settings`` of them."""
    if settings.get("use_dora") or settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise CheckpointError(f"'{file}' is a DoRA, or began from changed weights of the model: it is no plain LoRA")
    names = list(dict.fromkeys(name.removesuffix(DOWN) for name in named if name.endswith(DOWN)))
    known = {f"{name}{ending}" for name in names for ending in (DOWN, UP, ALPHA)}
    _refuse(file, [f"'{name}'" for name in named if name not in known], "holds keys that fit nothing in the model")
    if not names:
        raise CheckpointError(f"'{file}' holds no LoRA weights")
    layers = {}
    for name in names:
        down, up = named[f"{name}{DOWN}"], named.get(f"{name}{UP}")
        if up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise CheckpointError(f"'{file}': A and B of '{name}' do not go together, or one is missing")
        layers[name] = LoraLayer(down, up, _strength(file, name, named.get(f"{name}{ALPHA}"), settings, len(down)))
    return layers


def _strength(file: Path, name: str, tensor: Tensor | None, settings: Mapping[str, Any], rank: int) -> float:
    """Return a layer's alpha over its rank, by the tensor of its own, or the settings; 1 where neither says so."""
    from peft.utils.other import get_pattern_key

    pattern = settings.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), settings.get("lora_alpha"))
    if tensor is not None:
        own = float(tensor)
        if alpha is not None and own != float(alpha):
            raise CheckpointError(f"'{file}': alpha of '{name}' is {own} by its tensor and {alpha} by the settings")
        alpha = own
    strength = 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if not math.isfinite(strength):
        raise CheckpointError(f"'{file}': alpha of '{name}' is {alpha}, which is no strength")
    return strength


def _refuse(file: Path, problems: Sequence[str], what: str) -> None:
    """Raise CheckpointError with the first few problems, if there are any."""
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"the LoRA '{file}' {what}: {', '.join(problems[:SHOWN])}{more}")
