"""Rewards of samples, with a mark on those that could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """One reward's verdict on B samples. An invalid one is masked, never read as 0."""

    values: Tensor  # (B,) float32: what is trained on
    valid: Tensor  # (B,) bool
    raw: Tensor | None = None  # (B,) float32: the published score, where ``values`` are a transform of it
    details: Mapping[str, Tensor] = field(default_factory=dict)  # further figures (B,) by name, to look at
    reasons: Mapping[int, str] = field(default_factory=dict)  # why a row is not valid

    def __len__(self) -> int:
        return self.values.numel()

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """The scores of consecutive samples as one; ``raw`` and details are NaN for samples that have none."""
        starts = [sum(len(part) for part in parts[:place]) for place in range(len(parts))]
        names = dict.fromkeys(name for part in parts for name in part.details)

        def filled(figures: Sequence[Tensor | None]) -> Tensor:
            pairs = zip(figures, parts, strict=True)
            return torch.cat([torch.full_like(part.values, torch.nan) if one is None else one for one, part in pairs])

        return Scores(
            values=torch.cat([part.values for part in parts]),
            valid=torch.cat([part.valid for part in parts]),
            raw=None if all(part.raw is None for part in parts) else filled([part.raw for part in parts]),
            details={name: filled([part.details.get(name) for part in parts]) for name in names},
            reasons={
                start + row: reason
                for start, part in zip(starts, parts, strict=True)
                for row, reason in part.reasons.items()
            },
        )
