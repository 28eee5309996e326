"""The trained part of a diffusers pipeline, its transformer or LoRA weights on it: making, saving and restoring."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError, ModelError, nearest
from branchtree.plugins.protocols import LoraSettings
from branchtree_adapters.pipeline.sources import LORA_FILE, on_meta


def lora_sites(denoiser: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    """The linear layers whose names end in one of ``targets``. Raises ModelError for a target that finds none."""
    linear = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        here = {n: m for n, m in linear.items() if n == target or n.endswith(f".{target}")}
        if not here:
            endings = {re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in linear}
            raise ModelError(f"LoRA target '{target}' names no linear layer{nearest(target, endings)}")
        found |= here
    return list(found.values())


def lora_parameters_per_rank(denoiser: nn.Module, targets: Sequence[str]) -> int:
    """Numbers that each unit of LoRA rank adds on ``targets``: inputs plus outputs of every linear layer."""
    return sum(layer.in_features + layer.out_features for layer in lora_sites(denoiser, targets))


def add_lora(denoiser: Any, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Freeze ``denoiser`` (a diffusers model) and put trainable float32 LoRA weights on ``targets``.

    They are initialised from ``seed`` alone, and torch's random state is left as it was. What they are applied to keeps
    its dtype. Raises ModelError.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    lora_sites(denoiser, targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    denoiser.requires_grad_(False)
    devices = [denoiser.device] if denoiser.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in (module for module in denoiser.modules() if isinstance(module, LoraLayer)):
        # Otherwise peft would cast every activation to the float32 of the weights.
        layer.cast_input_dtype_enabled = False
        for weights in (layer.lora_A, layer.lora_B):
            for name, linear in weights.items():
                weights[name] = CastingLinear.sharing(linear)


class CastingLinear(nn.Linear):
    """A linear layer that casts its weight to its input's dtype in each call; the weight's gradient keeps its own."""

    @staticmethod
    def sharing(linear: nn.Linear) -> CastingLinear:
        """A layer with the weight of ``linear``, which has no bias."""
        casting = CastingLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        casting.weight = linear.weight
        return casting

    def forward(self, input: Tensor) -> Tensor:
        """Apply the weight to ``input``."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


@contextmanager
def lora_disabled(denoiser: nn.Module) -> Iterator[None]:
    """A context in which ``denoiser`` (wrapped or not) acts without its LoRA. Raises ModelError if it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelError("this model has no LoRA layers to switch off; keep a frozen copy of it instead.")
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def trained_state(denoiser: nn.Module, replacement: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The trainable parameters by name, or ``replacement`` in their dtypes.

    Raises CheckpointError if the names or shapes of ``replacement`` are not theirs.
    """
    live = {name: p.detach() for name, p in denoiser.named_parameters() if p.requires_grad}
    if replacement is None:
        return live
    require_same("the weights to save", live, replacement)
    return {name: replacement[name].detach().to(live[name].dtype) for name in live}


def require_same(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless both have the same names and shapes; ``what`` begins the message."""
    if expected.keys() != found.keys():
        lacking, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise CheckpointError(
            f"{what} do not belong to this model: {len(lacking)} missing (first: {lacking[:1]}), "
            f"{len(extra)} unknown (first: {extra[:1]})."
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"shape {tuple(found[name].shape)}, the model's is {tuple(tensor.shape)}"
            raise CheckpointError(f"{what} do not belong to this model: '{name}' has {shapes}.")


def has_lora(denoiser: nn.Module) -> bool:
    """Whether ``add_lora`` has been called on ``denoiser``."""
    return any("lora_" in name for name, _ in denoiser.named_parameters())


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
    weights = get_peft_model_state_dict(denoiser, state_dict=trained_state(denoiser, replacement))
    scale, metadata = config.lora_alpha / config.r, config.to_dict()
    if not exact or math.frexp(scale)[0] == 0.5:
        weights = {name: value * scale if _is_output(name) else value for name, value in weights.items()}
        metadata["lora_alpha"] = config.r
    pipeline.save_lora_weights(directory, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata)


def _is_output(name: str) -> bool:
    """Whether a LoRA weight is B, the one that is applied last."""
    return ".lora_B." in name


def with_weights(denoiser: Any, replacement: Mapping[str, Tensor] | None) -> Any:
    """A second model like ``denoiser``, with ``replacement`` in place of its trained weights; copies no weights.

    Raises CheckpointError if ``replacement`` belongs to another model.
    """
    twin = on_meta(lambda: type(denoiser).from_config(denoiser.config))
    state = {**denoiser.state_dict(), **trained_state(denoiser, replacement)}
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.requires_grad_(False).eval()


def restore_lora(denoiser: Any, directory: Path) -> None:
    """Read into ``denoiser`` what ``save_lora`` wrote. Raises CheckpointError if it is missing or another's."""
    from peft import get_peft_model_state_dict

    file, config = directory / LORA_FILE, denoiser.peft_config["default"]
    live = get_peft_model_state_dict(denoiser, state_dict=trained_state(denoiser, None))
    named = {f"transformer.{name}": tensor for name, tensor in live.items()}
    factor = _scale_beside(file) / (config.lora_alpha / config.r)
    _copy_exactly(named, [file], {name: factor for name in named if _is_output(name)})


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
    _copy_exactly(denoiser.state_dict(), sorted(folder.glob("*.safetensors")))


@torch.no_grad()
def _copy_exactly(
    live: Mapping[str, Tensor], files: Sequence[Path], factors: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Read files into tensors, some of them multiplied by a factor. Raises CheckpointError for what does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved: dict[str, Tensor] = {}
    try:
        for file in files:
            saved |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read trained weights from '{file}': {error}") from error
    if not files:
        raise CheckpointError("the checkpoint holds no safetensors file of trained weights.")
    require_same(f"the trained weights in '{files[0].parent}'", live, saved)
    for name, tensor in live.items():
        if tensor.dtype != saved[name].dtype:
            dtypes = f"{saved[name].dtype} in the checkpoint and {tensor.dtype} in the model"
            raise CheckpointError(f"'{name}' is {dtypes}; load the model in the checkpoint's precision.")
    for name, tensor in live.items():
        tensor.copy_(saved[name] * factors[name] if name in factors else saved[name])
