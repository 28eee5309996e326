"""Scoring samples in the background, by a thread for each reward.

A reward gets the same calls in the same order as it would without threads, so overlap changes nothing but the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Any

import torch

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.plugins.protocols import Condition, Media, ReleasesMemory
from branchtree.plugins.scores import ask, failed_scores
from branchtree.recipe.build import NamedReward
from branchtree.recipe.schema import ScoringSection
from branchtree.training.microbatch import REWARD_REMEDY, RowLimit, RowLimits, ran_out_of_memory

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


@dataclass(frozen=True)
class Workers:
    """What makes those who decode, and those who score for one reward each."""

    decoding: Callable[[], Executor]
    scoring: Callable[[], Executor]


def make_workers(section: ScoringSection, device: torch.device) -> Workers:
    """Those of the ``scoring`` section: one thread each, whose work is done in order, or none.

    On a GPU decoding would only take turns with the rollout, and their memory would add up: there it has no thread.
    """

    threads = torch.get_num_threads()

    def adopt_settings() -> None:
        # A new thread would start on the first GPU, and its convolutions with a thread for every processor.
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def thread() -> Executor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring", initializer=adopt_settings)

    if not section.overlap:
        return Workers(InPlace, InPlace)
    return Workers(thread if device.type == "cpu" else InPlace, thread)


@dataclass
class _Desk:
    """One reward at work: its thread, what it was given, and a group that is not complete yet."""

    reward: NamedReward
    executor: Executor
    limit: RowLimit
    done: list[Future[tuple[Scores, float]]] = field(default_factory=list)
    open_group: list[Piece] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)  # how many were done at each seal

    def seal(self) -> None:
        self.close_group()
        self.sealed.append(len(self.done))

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
        shut_down([desk.executor for desk in self._desks], kind)

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

    def seal(self) -> None:
        """No sample of the prompts so far will follow."""
        for desk in self._desks:
            desk.seal()

    def results(self, seal: int = -1) -> dict[str, Scores]:
        """Each reward's scores, by label, of the pieces before a seal: by its number, or the last."""
        return {
            desk.reward.label: Scores.joined([future.result()[0] for future in desk.done[: desk.sealed[seal]]])
            for desk in self._desks
        }

    def rest(self) -> None:
        """Have rewards give their memory back."""
        for desk in self._desks:
            if isinstance(desk.reward.adapter, ReleasesMemory):
                desk.reward.adapter.release()

    @property
    def seconds(self) -> float:
        """What the finished scoring took, in all threads together."""
        return sum(future.result()[1] for desk in self._desks for future in desk.done)


def shut_down(executors: Sequence[Executor], kind: type[BaseException] | None) -> None:
    """End threads, after an exception of that kind or none: a person who interrupts does not wait for them."""
    at_once = kind is not None and not issubclass(kind, Exception)
    for executor in executors:
        executor.shutdown(wait=not at_once, cancel_futures=True)


def timed_scores(
    reward: NamedReward, media: Media, conditions: Sequence[Condition], limit: RowLimit
) -> tuple[Scores, float]:
    """One reward's checked scores, and the seconds they took.

    A reward of weight 0 is only looked at: where it fails, its samples are invalid, and nothing is raised.
    """
    start = time.perf_counter()
    try:
        scores = _scores(reward, media, conditions, limit)
    except RewardError as error:
        if reward.weight != 0:
            raise
        scores = failed_scores(len(media), str(error))
    return scores, time.perf_counter() - start


def _scores(reward: NamedReward, media: Media, conditions: Sequence[Condition], limit: RowLimit) -> Scores:
    """One reward's checked scores, of as many samples at once as its memory allows."""

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
        return score(slice(None))
    return Scores.joined([scores for _, scores in limit.each(len(media), score)])


def checked_scores(reward: NamedReward, media: Media, conditions: Sequence[Condition]) -> Scores:
    """One reward's scores; see ``ask``."""
    return ask(reward.label, reward.adapter, media, conditions)
