"""Held-out figures: rewards of deterministic samples, from the same noises every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from branchtree.assembly import NamedReward
from branchtree.protocols import Condition, ModelAdapter, Scores
from branchtree.recipe.schema import EvaluationSection
from branchtree.rollout import Sampler, chunks
from branchtree.training.policy import ConditioningCache
from branchtree.training.sampling import sample_latents
from branchtree.training.scoring import joined, score_latents
from branchtree.training.timing import Stopwatch


@dataclass(frozen=True)
class Figure:
    """One reward's mean over valid samples."""

    mean: float | None  # None if no sample is valid
    valid: int
    samples: int


@dataclass(frozen=True)
class Evaluator:
    """Scores the policy on held-out prompts; processes share the work and get the same answer."""

    section: EvaluationSection
    conditions: Sequence[Condition]
    rewards: Sequence[NamedReward]
    model: ModelAdapter
    cache: ConditioningCache
    sampler: Sampler
    autocast: Callable[[], AbstractContextManager[None]]
    device: torch.device

    def figures(self, accelerator: Any) -> dict[str, Figure]:
        """Each reward's figure by label."""
        from accelerate.utils import gather_object

        pairs = [(p, draw) for p in range(len(self.conditions)) for draw in range(self.section.noises)]
        # Whole batches are dealt out, so that a sample's batch mates do not depend on the number of processes.
        batches = chunks(len(pairs), self.section.rows)[accelerator.process_index :: accelerator.num_processes]
        parts = [self._score([pairs[row] for row in span]) for span in batches]
        everyone: list[dict[str, Scores]] = gather_object(parts)
        return {reward.label: _figure(joined([part[reward.label] for part in everyone])) for reward in self.rewards}

    def _score(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Scores]:
        conditions = [self.conditions[prompt] for prompt, _ in pairs]
        latents = sample_latents(
            self.model, self.cache, self.sampler, self.autocast, conditions, pairs, self.section.seed, self.device
        )
        scores, _ = score_latents(
            self.model, self.rewards, latents, conditions, self.section.rows, Stopwatch(self.device)
        )
        return scores


def _figure(scores: Scores) -> Figure:
    values = scores.values[scores.valid].double()
    mean = float(values.mean()) if values.numel() else None
    return Figure(mean=mean, valid=values.numel(), samples=scores.values.numel())
