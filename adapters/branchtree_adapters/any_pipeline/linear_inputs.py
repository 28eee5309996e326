"""Linear layers that compute the same whether their weights are trained or frozen.

Where a layer's input is not contiguous, torch copies it if the weight has a gradient, and otherwise multiplies batch by
batch. The results differ in their last bits: between a frozen copy and the trained weights, or a rollout under autocast
and the gradient pass that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def make_contiguous(denoisers: Iterable[nn.Module], run: Callable[[], Any]) -> None:
    """Have those layers copy their inputs from now on to which ``run`` gives some that are not contiguous."""
    found: set[nn.Module] = set()

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and not args[0].is_contiguous():
            found.add(layer)

    layers = [layer for module in denoisers for layer in module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for layer in found:
        layer.register_forward_pre_hook(_contiguous)


def _contiguous(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in args)
