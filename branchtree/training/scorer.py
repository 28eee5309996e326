"""From clean latents to scores: decoding in pieces that fit in memory, and scoring, behind the run's other work."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.plugins.protocols import Condition, Media, ModelAdapter
from branchtree.recipe.build import NamedReward
from branchtree.training.faults import find_faults, mask_faults
from branchtree.training.microbatch import RowLimit, RowLimits
from branchtree.training.scoring import AHEAD, Piece, ScoringQueue, Workers, shut_down


class Scorer:
    """Decodes and scores samples in the order they come. Use it as a context: leaving it ends its threads.

    ``limit`` says how many are decoded at once, ``limits`` remembers what rewards have memory for. Raises RewardError,
    from ``put`` or ``scores``, if a reward fails, and DeviceMemoryError if one sample does not fit.
    """

    def __init__(
        self,
        model: ModelAdapter,
        rewards: Sequence[NamedReward],
        workers: Workers,
        limits: RowLimits,
        limit: RowLimit,
        device: torch.device,
    ) -> None:
        self._model = model
        self._limit = limit
        self._device = device
        self._queue = ScoringQueue(rewards, workers.scoring, limits)
        self._decoding = workers.decoding()
        self._given: list[Future[list[Media]]] = []
        self._decoded = 0  # samples so far
        self._faults: dict[int, str] = {}  # what the model spoiled, by sample
        self.decoding_seconds = 0.0

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shut_down([self._decoding], kind)
        self._queue.__exit__(kind, error, at)

    def put(
        self,
        latents: Tensor,
        conditions: Sequence[Condition],
        prompts: Sequence[int],
        keep: Container[int] = frozenset(),
    ) -> Future[list[Media]]:
        """Have clean latents (L, *latent) decoded, and sample i scored against condition i.

        ``prompts`` (L,) says which prompt each belongs to; of each, all samples are given at once. Returns the media
        of those in ``keep``, one sample each, on the CPU. Waits while more than ``AHEAD`` earlier ones are not decoded.
        """
        kept = self._decoding.submit(self._decode, latents, conditions, prompts, keep)
        self._given.append(kept)
        for earlier in self._given[: -AHEAD - 1]:
            earlier.result()
        if kept.done():
            kept.result()  # raises where it failed
        return kept

    @torch.no_grad()
    def _decode(
        self,
        latents: Tensor,
        conditions: Sequence[Condition],
        prompts: Sequence[int],
        keep: Container[int],
    ) -> list[Media]:
        kept: list[Media] = []
        for rows, media in self._limit.each(len(latents), lambda rows: self._timed(latents[rows])):
            faults = find_faults(self._model, latents[rows], media.pixels)
            self._faults |= {self._decoded + row: reason for row, reason in faults.items()}
            self._decoded += len(media)
            kept += [_on_cpu(media[row - rows.start :][:1]) for row in range(rows.start, rows.stop) if row in keep]
            self._queue.put(Piece(media, conditions[rows], prompts[rows]))
        self._queue.seal()
        return kept

    def _timed(self, latents: Tensor) -> Media:
        start = time.perf_counter()
        media = self._model.decode(latents)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.decoding_seconds += time.perf_counter() - start
        return media

    def scores(self, puts: int | None = None) -> dict[str, Scores]:
        """Each reward's scores, by label, of what was given first, or of all; after all, model and rewards rest."""
        count = len(self._given) if puts is None else puts
        for given in self._given[:count]:
            given.result()
        if count < len(self._given):
            return self._masked(self._queue.results(count - 1))
        self._model.release_frozen()
        scores = self._queue.results()
        self._queue.rest()
        return self._masked(scores)

    def _masked(self, scores: Mapping[str, Scores]) -> dict[str, Scores]:
        return {label: mask_faults(each, self._faults) for label, each in scores.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """What decoding and scoring took so far, in whatever thread."""
        return {"decode_work": self.decoding_seconds, "reward_work": self._queue.seconds}


def _on_cpu(media: Media) -> Media:
    """A copy, so that the rest of its batch can go."""
    pixels = media.pixels.cpu().clone()
    return Media(images=pixels) if media.videos is None else Media(videos=pixels, fps=media.fps)
