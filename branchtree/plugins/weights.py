"""Trained weights of any module, all of them or low-rank ones: made, saved and read back to the bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import CheckpointError, ModelError, nearest
from branchtree.plugins.values import LoraSettings


def linear_layers(denoiser: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    """Return the linear layers whose names end in one of ``targets``. Raises ModelError for one that finds none."""
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
    """Return how many numbers each unit of LoRA rank adds: inputs plus outputs of every layer in ``targets``."""
    return sum(layer.in_features + layer.out_features for layer in linear_layers(denoiser, targets))


def add_lora(denoiser: Any, settings: LoraSettings, targets: Sequence[str], seed: int) -> None:
    """Freeze ``denoiser`` and put trainable float32 LoRA weights on ``targets``, endings of linear layers' names.

    A model of diffusers takes them by its ``add_adapter``, so that its library knows of them; any other by peft. They
    are initialised from ``seed`` alone, and torch's random state is left as it was. What they are applied to keeps its
    dtype. Raises ModelError for a target that names no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    linear_layers(denoiser, targets)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    denoiser.requires_grad_(False)
    device = next(denoiser.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config)
        else:
            inject_adapter_in_model(config, denoiser)
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
        """Return a layer with the weight of ``linear``, which has no bias."""
        casting = CastingLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        casting.weight = linear.weight
        return casting

    def forward(self, input: Tensor) -> Tensor:
        """Apply the weight to ``input``."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


@contextmanager
def lora_disabled(denoiser: nn.Module) -> Iterator[None]:
    """Have ``denoiser``, wrapped or not, act without its LoRA in a block. Raises ModelError if it has none."""
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


def has_lora(denoiser: nn.Module) -> bool:
    """Return whether ``add_lora`` has been called on ``denoiser``."""
    return any("lora_" in name for name, _ in denoiser.named_parameters())


def trained_state(denoiser: nn.Module, replacement: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the trainable parameters by name, or ``replacement`` in their dtypes.

    Raises CheckpointError if the names or shapes of ``replacement`` are not theirs.
    """
    live = {name: p.detach() for name, p in denoiser.named_parameters() if p.requires_grad}
    if replacement is None:
        return live
    require_same_shapes("the weights to save", live, replacement)
    return {name: replacement[name].detach().to(live[name].dtype) for name in live}


def require_same_shapes(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
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


def read_safetensors(files: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of safetensors files, and the texts of their metadata. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            tensors |= load_file(file)
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"cannot read trained weights from '{file}': {error}") from error
    return tensors, metadata


@torch.no_grad()
def copy_exactly(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copy tensors that were saved to ``folder`` into those of a model.

    Raises CheckpointError, before any is changed, where names, shapes or dtypes are others.
    """
    if not saved:
        raise CheckpointError(f"the checkpoint holds no safetensors file of trained weights in '{folder}'.")
    require_same_shapes(f"the trained weights in '{folder}'", live, saved)
    for name, tensor in live.items():
        if tensor.dtype != saved[name].dtype:
            dtypes = f"{saved[name].dtype} in the checkpoint and {tensor.dtype} in the model"
            raise CheckpointError(f"'{name}' is {dtypes}; load the model in the checkpoint's precision.")
    for name, tensor in live.items():
        tensor.copy_(saved[name])
