"""From leaves to rewards: decoding and scoring in pieces that fit in memory, while the next tree grows.

Samples are decoded by the thread that owns the model and scored by others, one for each reward. A reward gets the same
calls in the same order as it would without threads, so overlap changes nothing but the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from branchtree.assembly import NamedReward
from branchtree.errors import RewardError
from branchtree.protocols import Condition, Media, ModelAdapter, ReleasesMemory, Scores
from branchtree.recipe.schema import ScoringSection
from branchtree.training.microbatch import REWARD_REMEDY, RowLimit, RowLimits, ran_out_of_memory
from branchtree.training.timing import Stopwatch

AHEAD = 2
"""Decoded pieces that may wait to be scored; more would only hold memory."""


@dataclass(frozen=True)
class Piece:
    """Decoded samples, what each was asked to show, and which prompt it belongs to; a prompt's samples adjoin."""

    media: Media
    conditions: Sequence[Condition]
    prompts: Sequence[int]

    def __getitem__(self, rows: slice) -> Piece:
        return Piece(self.media[rows], self.conditions[rows], self.prompts[rows])

    @staticmethod
    def joined(pieces: Sequence[Piece]) -> Piece:
        """Consecutive pieces as one."""
        return Piece(
            Media.joined([piece.media for piece in pieces]),
            [condition for piece in pieces for condition in piece.conditions],
            [prompt for piece in pieces for prompt in piece.prompts],
        )

    @property
    def groups(self) -> list[Piece]:
        """Its parts by prompt."""
        runs = [list(run) for _, run in groupby(range(len(self.prompts)), key=self.prompts.__getitem__)]
        return [self[run[0] : run[-1] + 1] for run in runs]


class InPlace(Executor):
    """Does each task as it is submitted: scoring without overlap."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished task."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def make_executor(section: ScoringSection, device: torch.device) -> Callable[[], Executor]:
    """What makes the executors of the ``scoring`` section: one thread, whose work is done in order, or none."""

    def adopt_device() -> None:
        if device.type == "cuda":  # a new thread would start on the first GPU
            torch.cuda.set_device(device)

    def thread() -> Executor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward", initializer=adopt_device)

    return thread if section.overlap else InPlace


@dataclass
class _Desk:
    """One reward at work: its thread, what it was given, and a group that is not complete yet."""

    reward: NamedReward
    executor: Executor
    limit: RowLimit
    done: list[Future[tuple[Scores, float]]] = field(default_factory=list)
    open_group: list[Piece] = field(default_factory=list)

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
            self._score(Piece.joined(self.open_group))
            self.open_group = []

    def _score(self, piece: Piece) -> None:
        work = self.executor.submit(timed_scores, self.reward, piece.media, piece.conditions, self.limit)
        self.done.append(work)


class ScoringQueue:
    """Scores pieces in the order they come. Use it as a context: leaving it ends its threads.

    ``executor`` makes what a reward's work is given to; ``limits`` remembers what rewards have memory for. Raises
    RewardError, from ``put`` or ``results``, if a reward fails or returns something that is not one number per sample.
    """

    def __init__(
        self, rewards: Sequence[NamedReward], executor: Callable[[], Executor], limits: RowLimits | None = None
    ) -> None:
        each = [RowLimit(f"rewards.{r.label}", None) if limits is None else limits.reward(r.label) for r in rewards]
        self._desks = [_Desk(reward, executor(), limit) for reward, limit in zip(rewards, each, strict=True)]
        self._waiting: deque[list[Future[tuple[Scores, float]]]] = deque()

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        at_once = kind is not None and not issubclass(kind, Exception)  # a person who interrupts does not wait
        for desk in self._desks:
            desk.executor.shutdown(wait=not at_once, cancel_futures=True)

    def put(self, piece: Piece) -> None:
        """Hand over a piece; waits while more than ``AHEAD`` earlier ones are not scored."""
        before = [len(desk.done) for desk in self._desks]
        for desk in self._desks:
            desk.take(piece)
        self._waiting.append(
            [future for desk, start in zip(self._desks, before, strict=True) for future in desk.done[start:]]
        )
        while len(self._waiting) > AHEAD:
            for future in self._waiting.popleft():
                future.result()

    def results(self) -> dict[str, Scores]:
        """Each reward's scores of all pieces, by label."""
        for desk in self._desks:
            desk.close_group()
        scores = {
            desk.reward.label: Scores.joined([future.result()[0] for future in desk.done]) for desk in self._desks
        }
        for desk in self._desks:
            if isinstance(desk.reward.adapter, ReleasesMemory):
                desk.reward.adapter.release()
        return scores

    @property
    def seconds(self) -> float:
        """What the finished scoring took, in all threads together."""
        return sum(future.result()[1] for desk in self._desks for future in desk.done)


def decode_and_put(
    queue: ScoringQueue,
    model: ModelAdapter,
    latents: Tensor,
    conditions: Sequence[Condition],
    prompts: Sequence[int],
    limit: RowLimit,
    watch: Stopwatch,
    keep: int = 0,
) -> list[Media]:
    """Decode clean latents (L, *latent), and have sample i scored against condition i.

    As many go at a time as ``limit`` says. Returns the first ``keep`` samples' media in order, on the CPU.
    """
    kept: list[Media] = []

    def decode(rows: slice) -> Media:
        with watch.phase("decode"):
            return model.decode(latents[rows])

    for piece, media in limit.each(len(latents), decode):
        if piece.start < keep:
            kept.append(_on_cpu(media[: keep - piece.start]))
        with watch.phase("reward"):
            queue.put(Piece(media, conditions[piece], prompts[piece]))
    return kept


def timed_scores(
    reward: NamedReward, media: Media, conditions: Sequence[Condition], limit: RowLimit
) -> tuple[Scores, float]:
    """One reward's checked scores, and the seconds they took."""
    start = time.perf_counter()

    def score(rows: slice) -> Scores:
        try:
            return checked_scores(reward, media[rows], conditions[rows])
        except RewardError as error:
            cause = error.__cause__
            if cause is None or not ran_out_of_memory(cause):
                raise
            if reward.groupwise or len(conditions[rows]) == 1:
                raise RewardError(f"{error}; {REWARD_REMEDY}") from cause
            raise cause from None  # fewer samples at once may do

    if reward.groupwise:  # a group cannot be cut
        return score(slice(None)), time.perf_counter() - start
    parts = [part for _, part in limit.each(len(media), score)]
    return Scores.joined(parts), time.perf_counter() - start


def checked_scores(reward: NamedReward, media: Media, conditions: Sequence[Condition]) -> Scores:
    """One reward's scores on the CPU; a value that is not finite is marked invalid."""
    try:
        with torch.no_grad():
            scores = reward.adapter.score(media, conditions)
    except Exception as error:
        # A reward is a plug-in and can raise anything; the run must end with a message that names it.
        raise RewardError(f"reward '{reward.label}' failed: {type(error).__name__}: {error}") from error
    if scores.values.shape != (len(media),) or scores.valid.shape != (len(media),):
        raise RewardError(
            f"reward '{reward.label}' must give {len(media)} values and valid flags for as many samples, "
            f"not {tuple(scores.values.shape)} and {tuple(scores.valid.shape)}"
        )
    values = scores.values.detach().float().cpu()
    finite = values.isfinite()
    return Scores(
        values=values,
        valid=scores.valid.detach().cpu() & finite,
        raw=None if scores.raw is None else scores.raw.detach().float().cpu(),
        details={name: figure.detach().float().cpu() for name, figure in scores.details.items()},
        reasons={**dict.fromkeys(_rows(~finite), "the value is not finite"), **scores.reasons},
    )


def _rows(flags: Tensor) -> Iterable[int]:
    return [int(row) for row in flags.nonzero().flatten()]


def _on_cpu(media: Media) -> Media:
    if media.images is None:
        return Media(videos=media.pixels.cpu(), fps=media.fps)
    return Media(images=media.pixels.cpu())
