"""Decoding by any model: samples may depend on their conditions, or on the latents alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Conditioning


@dataclass(frozen=True)
class Encoded:
    """What B samples were sampled under."""

    conditioning: Conditioning  # of P prompts
    prompt: Tensor  # which of them each sample belongs to, (B,)

    def __getitem__(self, rows: slice) -> Encoded:
        return Encoded(self.conditioning, self.prompt[rows])

    def decode(self, model: ModelAdapter, latents: Tensor) -> Samples:
        """Decode clean latents (B, *latent). A ``decode`` with a parameter ``conditioning`` gets B rows there."""
        own: Any = model.decode
        if "conditioning" not in inspect.signature(own).parameters:
            return model.decode(latents)
        rows: Mapping[str, Tensor] = {name: value[self.prompt] for name, value in self.conditioning.items()}
        samples: Samples = own(latents, conditioning=rows)
        return samples


NOT_ENCODED = Encoded({}, torch.zeros(0, dtype=torch.int64))
"""For models that decode by the latents alone."""
