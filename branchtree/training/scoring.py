"""From clean latents to scores: decoding in pieces that fit in memory, and scoring, behind the run's other work.

A reward gets the same calls in the same order as it would without threads, so overlap changes nothing but the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins.decoding import NOT_ENCODED, Encoded
from branchtree.plugins.protocols import ModelAdapter, ReleasesMemory
from branchtree.plugins.samples import Samples
from branchtree.plugins.scores import NamedReward, ask, failed_scores
from branchtree.plugins.values import Condition
from branchtree.training.faults import find_faults, mask_faults
from branchtree.training.limits import REWARD_REMEDY, RowLimit, RowLimits, ran_out_of_memory

AHEAD = 2
"""Decoded pieces that may wait to be scored; more would only hold memory."""


@dataclass(frozen=True)
class Piece:
    """Decoded samples, what each was asked to show, and its prompt; a prompt's samples are consecutive."""

    media: Samples
    conditions: Sequence[Condition]
    prompts: Sequence[int]

    def __getitem__(self, rows: slice) -> Piece:
        return Piece(self.media[rows], self.conditions[rows], self.prompts[rows])

    @staticmethod
    def concatenate(pieces: Sequence[Piece]) -> Piece:
        """Return consecutive pieces as one."""
        return Piece(
            pieces[0].media.concatenate([piece.media for piece in pieces]),
            [condition for piece in pieces for condition in piece.conditions],
            [prompt for piece in pieces for prompt in piece.prompts],
        )

    @property
    def groups(self) -> list[Piece]:
        """The piece cut by prompt."""
        runs = [list(run) for _, run in groupby(range(len(self.prompts)), key=self.prompts.__getitem__)]
        return [self[run[0] : run[-1] + 1] for run in runs]


class Worker:
    """Does tasks one after the other: in a thread of its own, or, not in the ``background``, as they are given."""

    def __init__(self, background: bool, device: torch.device) -> None:
        threads = torch.get_num_threads()

        def adopt_settings() -> None:
            # A new thread would start on the first GPU, and its convolutions with a thread for every processor.
            torch.set_num_threads(threads)
            if device.type == "cuda":
                torch.cuda.set_device(device)

        self._executor: Executor | None = None
        if background:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="scoring", initializer=adopt_settings)

    def submit(self, task: Callable[..., Any], *given: Any) -> Future[Any]:
        """Return the future of a task; it is done already where there is no thread."""
        if self._executor is not None:
            return self._executor.submit(task, *given)
        future: Future[Any] = Future()
        try:
            future.set_result(task(*given))
        except Exception as error:
            future.set_exception(error)
        return future

    def stop(self, kind: type[BaseException] | None) -> None:
        """End the thread, after an exception of that kind or none: a person who interrupts does not wait for it."""
        at_once = kind is not None and not issubclass(kind, Exception)
        if self._executor is not None:
            self._executor.shutdown(wait=not at_once, cancel_futures=True)


@dataclass
class _Lane:
    """One reward at work: its worker, the futures of its calls, and a group that is not complete yet."""

    reward: NamedReward
    worker: Worker
    limit: RowLimit
    calls: list[Future[tuple[Scores, float]]] = field(default_factory=list)
    open_group: list[Piece] = field(default_factory=list)
    sealed: list[int] = field(default_factory=lambda: [0])  # how many calls there were at each seal

    def take(self, piece: Piece) -> None:
        if not self.reward.groupwise:
            self._score(piece)
            return
        for group in piece.groups:
            if self.open_group and self.open_group[0].prompts[0] != group.prompts[0]:
                self.close_group()
            self.open_group.append(group)

    def close_group(self) -> None:
        if self.open_group:
            self._score(Piece.concatenate(self.open_group))
            self.open_group = []

    def _score(self, piece: Piece) -> None:
        self.calls.append(self.worker.submit(timed_scores, self.reward, piece.media, piece.conditions, self.limit))


class ScoringQueue:
    """Scores pieces in the order they come. Use it as a context: leaving it ends its threads.

    ``limits`` remembers what rewards have memory for. Raises RewardError, from ``put`` or ``results``, if a reward
    fails or returns something that is not one number per sample.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        background: bool,
        limits: RowLimits | None = None,
        device: torch.device | None = None,
    ) -> None:
        each = [RowLimit(f"rewards.{r.label}", None) if limits is None else limits.reward(r.label) for r in rewards]
        self._lanes = [
            _Lane(reward, Worker(background, device or torch.device("cpu")), limit)
            for reward, limit in zip(rewards, each, strict=True)
        ]
        self._waiting: deque[list[Future[tuple[Scores, float]]]] = deque()

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for lane in self._lanes:
            lane.worker.stop(kind)

    def put(self, piece: Piece) -> None:
        """Hand over a piece; waits while more than ``AHEAD`` earlier ones are not scored."""
        before = [len(lane.calls) for lane in self._lanes]
        for lane in self._lanes:
            lane.take(piece)
        self._waiting.append(
            [future for lane, start in zip(self._lanes, before, strict=True) for future in lane.calls[start:]]
        )
        while len(self._waiting) > AHEAD:
            for future in self._waiting.popleft():
                future.result()

    def seal(self) -> None:
        """Say that no sample of the prompts so far will follow."""
        for lane in self._lanes:
            lane.close_group()
            lane.sealed.append(len(lane.calls))

    def results(self, first: int = 0, last: int | None = None) -> dict[str, Scores]:
        """Return each reward's scores, by label, of what was given between two seals, by number; of all by default."""
        end = -1 if last is None else last
        return {
            lane.reward.label: Scores.concatenate(
                [call.result()[0] for call in lane.calls[lane.sealed[first] : lane.sealed[end]]]
            )
            for lane in self._lanes
        }

    def release(self) -> None:
        """Have rewards give their memory back."""
        for lane in self._lanes:
            if isinstance(lane.reward.adapter, ReleasesMemory):
                lane.reward.adapter.release()

    @property
    def seconds(self) -> float:
        """What the finished scoring took, in all threads together."""
        return sum(future.result()[1] for lane in self._lanes for future in lane.calls)


class Scorer:
    """Decodes and scores samples in the order they come. Use it as a context: leaving it ends its threads.

    Args:
        model: decodes.
        rewards: score.
        limits: remember what rewards have memory for.
        limit: how many samples are decoded at once.
        device: where all of it works.
        background: whether rewards score in threads of their own.
        decoding: whether decoding has a thread of its own.

    Raises:
        RewardError: from ``put`` and the scores, if a reward fails.
        DeviceMemoryError: one sample does not fit.
    """

    def __init__(
        self,
        model: ModelAdapter,
        rewards: Sequence[NamedReward],
        limits: RowLimits,
        limit: RowLimit,
        device: torch.device,
        background: bool = False,
        decoding: bool = False,
    ) -> None:
        self._model = model
        self._limit = limit
        self._device = device
        self._queue = ScoringQueue(rewards, background, limits, device)
        self._decoder = Worker(decoding, device)
        self._given: list[Future[list[Samples]]] = []
        self._starts = [0]  # samples before each put, and before the next
        self._decoded = 0  # samples so far
        self._faults: dict[int, str] = {}  # what the model spoiled, by sample
        self.decoding_seconds = 0.0

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._decoder.stop(kind)
        self._queue.__exit__(kind, error, at)

    def put(
        self,
        latents: Tensor,
        conditions: Sequence[Condition],
        prompts: Sequence[int],
        keep: Container[int] = frozenset(),
        encoded: Encoded = NOT_ENCODED,
    ) -> Future[list[Samples]]:
        """Have clean latents (L, *latent) decoded, and sample i scored against condition i.

        ``prompts`` (L,) says which prompt each belongs to; of each, all samples are given at once. ``encoded`` is what
        they were sampled under. Returns the media of those in ``keep``, one sample each, on the CPU. Waits while more
        than ``AHEAD`` earlier ones are not decoded.
        """
        kept = self._decoder.submit(self._decode, latents, conditions, prompts, keep, encoded)
        self._given.append(kept)
        self._starts.append(self._starts[-1] + len(latents))
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
        encoded: Encoded,
    ) -> list[Samples]:
        kept: list[Samples] = []
        for rows, media in self._limit.each(len(latents), lambda rows: self._timed(latents[rows], encoded[rows])):
            faults = find_faults(self._model, latents[rows], media)
            self._faults |= {self._decoded + row: reason for row, reason in faults.items()}
            self._decoded += len(media)
            kept += [media[row - rows.start :][:1].cpu() for row in range(rows.start, rows.stop) if row in keep]
            self._queue.put(Piece(media, conditions[rows], prompts[rows]))
        self._queue.seal()
        return kept

    def _timed(self, latents: Tensor, encoded: Encoded) -> Samples:
        start = time.perf_counter()
        media = encoded.decode(self._model, latents)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.decoding_seconds += time.perf_counter() - start
        return media

    def scores_of(self, put: int) -> dict[str, Scores]:
        """Return each reward's scores, by label, of what was given in one ``put``, counted from 0; waits for them."""
        self._given[put].result()
        return self._masked(self._queue.results(put, put + 1), self._starts[put])

    def finish(self) -> dict[str, Scores]:
        """Return each reward's scores, by label, of all samples; model and rewards then give memory back."""
        for given in self._given:
            given.result()
        self._model.release_frozen()
        scores = self._queue.results()
        self._queue.release()
        return self._masked(scores, 0)

    def _masked(self, scores: Mapping[str, Scores], start: int) -> dict[str, Scores]:
        faults = {sample - start: reason for sample, reason in self._faults.items() if sample >= start}
        return {label: mask_faults(each, faults) for label, each in scores.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """What decoding and scoring took so far, in whatever thread."""
        return {"decode_work": self.decoding_seconds, "reward_work": self._queue.seconds}


def timed_scores(
    reward: NamedReward, media: Samples, conditions: Sequence[Condition], limit: RowLimit
) -> tuple[Scores, float]:
    """Return one reward's checked scores, of as many samples at once as its memory allows, and the seconds they took.

    A reward of weight 0 is only looked at: where it fails, its samples are invalid, and nothing is raised.
    """

    def score(rows: slice) -> Scores:
        try:
            return ask(reward.label, reward.adapter, media[rows], conditions[rows])
        except RewardError as error:
            cause = error.__cause__
            if cause is None or not ran_out_of_memory(cause):
                raise
            if reward.groupwise or len(conditions[rows]) == 1:
                raise RewardError(f"{error}; {REWARD_REMEDY}") from cause
            raise cause from None  # fewer samples at once may do

    start = time.perf_counter()
    try:
        if reward.groupwise:  # a group cannot be cut
            scores = score(slice(None))
        else:
            scores = Scores.concatenate([scores for _, scores in limit.each(len(media), score)])
    except RewardError as error:
        if reward.weight != 0:
            raise
        scores = failed_scores(len(media), str(error))
    return scores, time.perf_counter() - start
