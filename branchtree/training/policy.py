"""The policy as the core sees it: encoded prompts, and a velocity function."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from branchtree.protocols import Condition, Conditioning, ModelAdapter, VelocityFunction

CACHE_BYTES = 4 * 2**30
"""Host memory for encoded prompts: about a thousand of FLUX's in bfloat16."""


class ConditioningCache:
    """Encodes each prompt once and keeps the result on the CPU; the least recently used ones give way."""

    def __init__(self, model: ModelAdapter, limit: int = CACHE_BYTES) -> None:
        self._model = model
        self._limit = limit
        self._rows: OrderedDict[tuple[object, ...], dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def get(self, conditions: Sequence[Condition], device: torch.device) -> Conditioning:
        """The encoded conditions, P rows on the device. Encoders are released once nothing is missing."""
        keys = [_key(condition) for condition in conditions]
        missing = {key: condition for key, condition in zip(keys, conditions, strict=True) if key not in self._rows}
        if missing:
            encoded = self._model.encode(list(missing.values()))
            self._model.release_frozen()
            for row, key in enumerate(missing):
                self._rows[key] = {name: value[row].clone() for name, value in encoded.items()}
                self._bytes += _size(self._rows[key])
        rows = [self._rows[key] for key in keys]
        for key in keys:
            self._rows.move_to_end(key)
        self._shrink(keep=len(set(keys)))
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}

    def _shrink(self, keep: int) -> None:
        while self._bytes > self._limit and len(self._rows) > keep:
            _, row = self._rows.popitem(last=False)
            self._bytes -= _size(row)


def _key(condition: Condition) -> tuple[object, ...]:
    """All that an encoding may depend on."""
    return (condition.prompt, condition.negative_prompt, condition.image, condition.last_image, condition.video)


def _size(row: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())


def velocity_function(
    model: ModelAdapter,
    conditioning: Conditioning,
    autocast: Callable[[], AbstractContextManager[None]],
    denoiser: nn.Module | None = None,
) -> VelocityFunction:
    """The model under P encoded conditions, as a function of latents, sigma and which prompt each row follows."""

    def velocity(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        rows = {name: value[prompt] for name, value in conditioning.items()}
        with autocast():
            return model.predict(latents, sigma, rows, denoiser).float()

    return velocity
