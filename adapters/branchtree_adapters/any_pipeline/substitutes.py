"""What stands on a copy of a pipeline in the place of its denoiser and its VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from branchtree_adapters.any_pipeline.schedulers import StopCall

ENCODERS = ("text_encoder", "image_encoder")
"""What the names of encoders begin with."""


class Wrapped:
    """A denoiser that is called by way of ``outer``, with the attributes that a pipeline looks for on it.

    ``sharded`` says whether its weights are spread over processes.
    """

    def __init__(self, outer: Callable[..., Any], denoiser: nn.Module, sharded: bool = False) -> None:
        self._outer, self._denoiser, self.sharded = outer, denoiser, sharded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._outer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def rows_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return how many rows a call has: entries of its first list, or of the first axis of its first tensor."""
    given = (*args, *kwargs.values())
    return next(len(each) for each in given if isinstance(each, list) or (isinstance(each, Tensor) and each.ndim))


def stopping(denoiser: nn.Module) -> Wrapped:
    """Return a denoiser that leaves the call in which it is asked."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise StopCall

    return Wrapped(stop, denoiser)


class Silent:
    """A denoiser that works until it is ``silenced``, and then gives zeros of the same shapes for each row."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser, self.silenced = denoiser, False
        self._rows, self._output = 0, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the denoiser's output, or zeros."""
        rows = rows_of_call(args, kwargs)
        if not self.silenced or not self._rows:
            output = self._denoiser(*args, **kwargs)
            self._rows, self._output = rows, tree_map(_meta, output)
            return output
        device = next(leaf.device for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))

        def zeros(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return torch.zeros(len(leaf) * rows // self._rows, *leaf.shape[1:], dtype=leaf.dtype, device=device)

        return tree_map(zeros, self._output)


def _meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def casting(vae: Any) -> Any:
    """Return a VAE that takes tensors of any precision: pipelines give it those of their denoiser's."""
    other = copy.copy(vae)

    def cast(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda sample, *args, **kwargs: own(sample.to(vae.dtype), *args, **kwargs)

    other.__dict__.update(encode=cast(vae.encode), decode=cast(vae.decode))
    return other


def taking(vae: Any, taken: list[Tensor]) -> Any:
    """Return a VAE that adds what it is to decode to ``taken``, and leaves the call."""
    other = casting(vae)

    def decode(sample: Tensor, *args: Any, **kwargs: Any) -> None:
        taken.append(sample)
        raise StopCall

    other.__dict__.update(decode=decode)
    return other


def without_weights(pipeline: Any) -> dict[str, Any]:
    """Return what a pipeline still asks of its encoders when its prompts are encoded: their settings and precision."""
    found = {name: each for name, each in pipeline.components.items() if name.startswith(ENCODERS)}
    return {
        name: SimpleNamespace(config=each.config, dtype=each.dtype)
        for name, each in found.items()
        if isinstance(each, nn.Module)
    }
