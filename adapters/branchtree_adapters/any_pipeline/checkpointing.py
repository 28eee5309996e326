"""Gradient checkpointing of a model's blocks, with all that the model gives them.

A model of diffusers has a second call of its blocks for gradient checkpointing, and some leave arguments out there:
Chroma's single blocks get no mask. Here a model says which blocks it would checkpoint, and is then run without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(denoisers: Iterable[Any], run: Callable[[], Any]) -> None:
    """Have the blocks that ``run`` calls, with gradients, compute their activations again in the backward pass."""
    denoisers, blocks = list(denoisers), set[nn.Module]()

    def note(block: Any, *args: Any, **kwargs: Any) -> Any:
        blocks.add(getattr(block, "__self__", block))
        return block(*args, **kwargs)

    for denoiser in denoisers:
        denoiser.enable_gradient_checkpointing(note)
    try:
        run()
    finally:
        for denoiser in denoisers:
            denoiser.disable_gradient_checkpointing()
    for block in blocks:
        if not isinstance(block, Checkpointed):
            kind: Any = type(block)  # mypy takes no class for hashable
            block.__class__ = _checkpointed(kind)


class Checkpointed:
    """What is mixed into a block's class so that its calls are checkpointed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block."""
        own = super().__call__  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, **kwargs)


@functools.cache
def _checkpointed(kind: Any) -> type:
    """Return the class of a block with checkpointed calls; other libraries look for its name."""
    return type(kind.__name__, (Checkpointed, kind), {"__module__": kind.__module__})
