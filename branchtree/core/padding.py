"""Tensors of different sizes in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_together(values: Sequence[Tensor]) -> Tensor:
    """Stack tensors of as many axes, (N, *largest), with zeros at the ends of those that are smaller."""
    if all(value.shape == values[0].shape for value in values):
        return torch.stack(list(values))
    sizes = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    stacked = values[0].new_zeros(len(values), *sizes)
    for row, value in zip(stacked, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return stacked
