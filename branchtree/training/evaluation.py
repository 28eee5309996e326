"""Held-out figures: rewards of deterministic samples, from the same noises every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from branchtree.core.rollout import chunks
from branchtree.core.scores import Scores
from branchtree.core.segments import segment_count, segment_mean
from branchtree.errors import ModelError, RewardError
from branchtree.plugins.samples import Samples
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Condition
from branchtree.recipe.schema import EvaluationSection
from branchtree.training.faults import REMEDY, are_faults
from branchtree.training.limits import RowLimits
from branchtree.training.policy import Policy
from branchtree.training.processes import Processes
from branchtree.training.scoring import Scorer

Pair = tuple[int, int]
"""Which prompt, and which of its noises."""


@dataclass(frozen=True)
class Figure:
    """One reward's mean over valid samples."""

    mean: float | None  # None if no sample is valid
    valid: int
    samples: int
    std: float | None = None  # sample deviation; None for fewer than two
    prompts: Sequence[float | None] | None = None  # each prompt's mean, where it is known which sample is whose


@dataclass(frozen=True)
class Evaluated:
    """Samples of one model, in the order of the prompts and of each prompt's noises."""

    pairs: Sequence[Pair]  # of S samples
    scores: Mapping[str, Scores]  # by the rewards' labels, S of each
    media: Mapping[Pair, Samples]  # one sample each, of those that were to be kept; on the CPU

    @staticmethod
    def merge(shares: Sequence[Evaluated]) -> Evaluated:
        """Return the samples that several processes made as one, in order."""
        pairs = [pair for share in shares for pair in share.pairs]
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        return Evaluated(
            pairs=[pairs[row] for row in order],
            scores={
                label: Scores.concatenate([share.scores[label] for share in shares]).rows(torch.tensor(order))
                for label in shares[0].scores
            },
            media={pair: media for share in shares for pair, media in share.media.items()},
        )


@dataclass(frozen=True)
class Evaluator:
    """Scores a policy on held-out prompts; processes share the work and get the same answer.

    ``background`` says whether a batch is scored while the next one is sampled.
    """

    section: EvaluationSection
    conditions: Sequence[Condition]
    rewards: Sequence[NamedReward]
    policy: Policy
    limits: RowLimits
    background: bool
    joint: bool = False  # whether a forward is a call that all processes must make

    def figures(self, accelerator: Any) -> dict[str, Figure]:
        """Each reward's figure by label."""
        samples = self.samples(accelerator)
        prompts = torch.tensor([prompt for prompt, _ in samples.pairs])
        return {
            label: replace(figure_of(scores), prompts=prompt_means(scores, prompts, len(self.conditions)))
            for label, scores in samples.scores.items()
        }

    def samples(
        self,
        accelerator: Any,
        keep: AbstractSet[Pair] = frozenset(),
        advance: Callable[[int], None] | None = None,
    ) -> Evaluated:
        """Return all samples, scored, and the media of those in ``keep``.

        ``advance`` is called with the number of samples of each batch.
        """
        from accelerate.utils import gather_object

        pairs = [(p, draw) for p in range(len(self.conditions)) for draw in range(self.section.noises)]
        # Whole batches are dealt out, so that a sample's batch mates do not depend on the number of processes.
        batches = [[pairs[row] for row in span] for span in chunks(len(pairs), self._rows)]
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        most = len(batches[:: accelerator.num_processes])
        with Processes(accelerator, self.joint).together():
            scored = self._in_step(mine, batches[0], most, keep, advance)
        everyone: list[Evaluated] = gather_object(scored)
        samples = Evaluated.merge(everyone)
        self._require_samples(samples.scores)
        return samples

    def _require_samples(self, scores: Mapping[str, Scores]) -> None:
        """Raise ModelError if the model spoiled every sample, so that there is nothing to compare."""
        reasons = [reason for each in scores.values() for reason in each.reasons.values()]
        if are_faults(reasons) and not any(bool(each.valid.any()) for each in scores.values()):
            raise ModelError(f"no sample can be scored: {reasons[0]}; {REMEDY}")

    def _in_step(
        self,
        batches: Sequence[Sequence[Pair]],
        filler: Sequence[Pair],
        most: int,
        keep: AbstractSet[Pair],
        advance: Callable[[int], None] | None,
    ) -> list[Evaluated]:
        """Score some batches, and sample along with the process that has the ``most``, even if a reward fails."""
        sampled: list[int] = []
        try:
            scored = self._score(batches, keep, sampled, advance)
        except RewardError:
            self._fill(filler, most - len(sampled))
            raise
        self._fill(filler, most - len(sampled))
        return scored

    def _fill(self, pairs: Sequence[Pair], times: int) -> None:
        """Sample for nothing, where every forward is a call that all processes must make."""
        for _ in range(times if self.joint else 0):
            self._sampled(pairs, self.policy.under([self.conditions[prompt] for prompt, _ in pairs]))

    @property
    def _rows(self) -> int:
        """Samples in a batch; whole prompts where a reward must see a prompt's samples at once."""
        rows, noises = self.section.rows, self.section.noises
        return max(rows // noises, 1) * noises if any(reward.groupwise for reward in self.rewards) else rows

    def _score(
        self,
        batches: Sequence[Sequence[Pair]],
        keep: AbstractSet[Pair],
        sampled: list[int],
        advance: Callable[[int], None] | None,
    ) -> list[Evaluated]:
        """The samples of all batches as one entry; none if there are no batches. ``sampled`` gets each one's size."""
        if not batches:
            return []
        kept: list[Future[list[Samples]]] = []
        limits = self.limits
        # Decoding has no thread: prompts are encoded between two batches, and an adapter need not do both at once.
        with Scorer(
            self.policy.model, self.rewards, limits, limits.evaluation, self.policy.device, background=self.background
        ) as scorer:
            for done, pairs in enumerate(batches):
                conditions = [self.conditions[prompt] for prompt, _ in pairs]
                if not self.policy.cache.holds(conditions):
                    self.policy.cache.prepare(self._coming(batches[done:]), replace=True)
                policy = self.policy.under(conditions)
                latents = self._sampled(pairs, policy)
                sampled.append(len(pairs))
                rows = {row for row, pair in enumerate(pairs) if pair in keep}
                prompts, encoded = [prompt for prompt, _ in pairs], policy.encoded(range(len(pairs)))
                kept.append(scorer.put(latents, conditions, prompts, rows, encoded))
                if advance is not None:
                    advance(len(pairs))
            scores = scorer.finish()
        pairs = [pair for batch in batches for pair in batch]
        media = [single for put in kept for single in put.result()]
        return [Evaluated(pairs, scores, dict(zip([pair for pair in pairs if pair in keep], media, strict=True)))]

    def _coming(self, batches: Sequence[Sequence[Pair]]) -> list[Condition]:
        """The conditions of some batches, each once."""
        return [self.conditions[prompt] for prompt in dict.fromkeys(prompt for pairs in batches for prompt, _ in pairs)]

    def _sampled(self, pairs: Sequence[Pair], policy: Policy) -> Tensor:
        return policy.sample(policy.initial(self.section.seed, 0, pairs))


def figure_of(scores: Scores) -> Figure:
    """A reward's mean over its valid samples."""
    values = scores.values[scores.valid].double()
    mean = float(values.mean()) if values.numel() else None
    std = float(values.std()) if values.numel() > 1 else None
    return Figure(mean=mean, valid=values.numel(), samples=scores.values.numel(), std=std)


def prompt_means(scores: Scores, prompts: Tensor, count: int) -> list[float | None]:
    """Return the mean of each prompt's valid samples, ``prompts`` (S,) saying whose each is; None where none is."""
    values, whose = scores.values[scores.valid].double(), prompts[scores.valid]
    means, known = segment_mean(values, whose, count), segment_count(whose, count) > 0
    return [mean if valid else None for mean, valid in zip(means.tolist(), known.tolist(), strict=True)]
