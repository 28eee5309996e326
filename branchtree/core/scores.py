"""Rewards of samples, with a mark on those that could not be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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

    @property
    def usable(self) -> Tensor:
        """Which samples have a finite number to train on, (B,) bool on the CPU."""
        return self.valid.cpu() & self.values.cpu().isfinite()

    def rows(self, index: Tensor) -> Scores:
        """Return the scores of some samples, ``index`` (B',) int64, in its order and without repetition."""
        return Scores(
            values=self.values[index],
            valid=self.valid[index],
            raw=None if self.raw is None else self.raw[index],
            details={name: figure[index] for name, figure in self.details.items()},
            reasons={row: self.reasons[old] for row, old in enumerate(index.tolist()) if old in self.reasons},
        )

    @staticmethod
    def concatenate(batches: Sequence[Scores]) -> Scores:
        """Return the scores of consecutive samples; ``raw`` and details are NaN for samples that have none."""
        if len(batches) == 1:
            return batches[0]
        names = dict.fromkeys(name for batch in batches for name in batch.details)
        starts = list(accumulate((len(batch) for batch in batches), initial=0))

        def filled(figures: Sequence[Tensor | None]) -> Tensor:
            pairs = zip(figures, batches, strict=True)
            return torch.cat([torch.full_like(batch.values, torch.nan) if one is None else one for one, batch in pairs])

        return Scores(
            values=torch.cat([batch.values for batch in batches]),
            valid=torch.cat([batch.valid for batch in batches]),
            raw=None if all(batch.raw is None for batch in batches) else filled([batch.raw for batch in batches]),
            details={name: filled([batch.details.get(name) for batch in batches]) for name in names},
            reasons={
                start + row: reason
                for start, batch in zip(starts, batches, strict=False)
                for row, reason in batch.reasons.items()
            },
        )
