"""Held-out figures: rewards of deterministic samples, from the same noises every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
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
from branchtree.training.scoring import ScoringQueue, decode_and_put
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
    executor: Callable[[], Executor]  # what scores one batch while the next is sampled

    def figures(self, accelerator: Any) -> dict[str, Figure]:
        """Each reward's figure by label."""
        from accelerate.utils import gather_object

        pairs = [(p, draw) for p in range(len(self.conditions)) for draw in range(self.section.noises)]
        # Whole batches are dealt out, so that a sample's batch mates do not depend on the number of processes.
        batches = chunks(len(pairs), self._rows)[accelerator.process_index :: accelerator.num_processes]
        everyone: list[dict[str, Scores]] = gather_object(
            self._score([[pairs[row] for row in span] for span in batches])
        )
        scores = {reward.label: Scores.joined([part[reward.label] for part in everyone]) for reward in self.rewards}
        return {label: _figure(score) for label, score in scores.items()}

    @property
    def _rows(self) -> int:
        """Samples in a batch; whole prompts where a reward must see a prompt's samples at once."""
        rows, noises = self.section.rows, self.section.noises
        return max(rows // noises, 1) * noises if any(reward.groupwise for reward in self.rewards) else rows

    def _score(self, batches: Sequence[Sequence[tuple[int, int]]]) -> list[dict[str, Scores]]:
        """The scores of all batches as one entry; none if there are no batches."""
        if not batches:
            return []
        rows, watch = self.section.rows, Stopwatch(self.device)
        with ScoringQueue(self.rewards, self.executor) as queue:
            for pairs in batches:
                prompts = [prompt for prompt, _ in pairs]
                conditions = [self.conditions[prompt] for prompt in prompts]
                latents = sample_latents(
                    self.model,
                    self.cache,
                    self.sampler,
                    self.autocast,
                    conditions,
                    pairs,
                    self.section.seed,
                    self.device,
                    rows,
                )
                decode_and_put(queue, self.model, latents, conditions, prompts, rows, watch)
            self.model.release_frozen()
            return [queue.results()]


def _figure(scores: Scores) -> Figure:
    values = scores.values[scores.valid].double()
    mean = float(values.mean()) if values.numel() else None
    return Figure(mean=mean, valid=values.numel(), samples=scores.values.numel())
