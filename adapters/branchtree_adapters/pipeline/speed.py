"""Faster arithmetic for a denoiser of diffusers: attention back-ends and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import ModelError, nearest
from branchtree_adapters.pipeline.components import quiet

COMPILATIONS = 32
"""Compiled forms of a block: with and without gradients, LoRA and checkpointing, of one row, and of other numbers."""


def check_attention(backend: str | None) -> None:
    """Refuse an attention back-end that is unknown, not installed, or without a backward pass. Raises ModelError.

    Says nothing of whether it suits the device and the precision; the first forward does.
    """
    if backend is None:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [name.value for name in AttentionBackendName]
    if backend not in known:
        raise ModelError(f"attention '{backend}' is no back-end of diffusers{nearest(backend, known)}")
    if "sage" in backend:
        raise ModelError(
            f"attention '{backend}' has no backward pass, so that gradients would miss the attention; "
            "give another, such as 'flash', or leave the key out for diffusers' own choice."
        )
    reason = _obstacle(backend)
    if reason is not None:
        tried = [name for name in known if not name.endswith("_hub") and "sage" not in name]
        usable = [name for name in tried if _obstacle(name) is None]
        raise ModelError(
            f"attention '{backend}' cannot be used here: {reason} Those that can: {', '.join(usable)}; "
            "or leave the key out for diffusers' own choice."
        )


def set_attention(denoiser: Any, backend: str | None) -> None:
    """Have ``denoiser`` (a diffusers model) use an attention back-end; None leaves its own.

    Queries and keys then keep their dtype in their norms: under autocast RMSNorm returns float32, which most back-ends
    refuse. torch's own attention casts them back.
    """
    if backend is None:
        return
    from diffusers.models.attention import AttentionModuleMixin

    with _only_here():
        denoiser.set_attention_backend(backend)
    for attention in (module for module in denoiser.modules() if isinstance(module, AttentionModuleMixin)):
        for name, norm in attention.named_children():
            if name.startswith("norm_"):
                norm.register_forward_hook(_in_the_dtype_of_its_input)


def _in_the_dtype_of_its_input(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def compile_blocks(denoiser: nn.Module, backend: str) -> None:
    """Compile the repeated blocks of ``denoiser`` (a diffusers model) in place, each kind once for all its copies.

    Raises torch's process-wide limit on compilations of one function to ``COMPILATIONS``, if it is lower. Raises
    ModelError for a back-end that torch.compile does not know, or a model that names no repeated blocks.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ModelError(f"torch.compile has no back-end '{backend}'{nearest(backend, known)}")
    if not getattr(denoiser, "_repeated_blocks", None):
        raise ModelError(f"{type(denoiser).__name__} names no blocks that can be compiled; leave run.compile out.")
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    denoiser.compile_repeated_blocks(backend=backend)  # type: ignore[operator]


def _obstacle(backend: str) -> str | None:
    """Why a back-end cannot be used here, or None; found out on a model without layers."""
    from diffusers import ModelMixin

    try:
        with _only_here():
            ModelMixin().set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        return str(error)
    return None


@contextmanager
def _only_here() -> Iterator[None]:
    """Have other models use, afterwards, the back-end that they used before, without diffusers' warning."""
    from diffusers.models.attention_dispatch import attention_backend

    with quiet(), attention_backend("native"):
        yield
