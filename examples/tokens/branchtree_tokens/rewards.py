"""The rewards ``sudoku`` and ``addition``, which verify an answer. Axis letters: B samples, n positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from branchtree.plugins import Condition, Samples, Scores
from branchtree_tokens.samples import Grids, Texts
from branchtree_tokens.tasks import MASK, Puzzle, Sum, digits_covered, rules_kept, tokens_of


class SudokuConfig(BaseModel, extra="forbid", frozen=True):
    """``measure``: the share of the 12 rules that hold, whether all do, or the share of their 48 digits that are there.

    0 where a clue was changed.
    """

    measure: Literal["rules", "solved", "covered"] = "rules"


class AdditionConfig(BaseModel, extra="forbid", frozen=True):
    """``measure``: the share of the answer's digits that are right, whether all are, or how near the number is."""

    measure: Literal["digits", "exact", "near"] = "digits"


class SudokuReward:
    """Scores grids."""

    modalities = frozenset({"grid"})

    def __init__(self, config: SudokuConfig) -> None:
        self.config = config

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        """Score grid i under condition i. Raises ValueError for anything but B grids."""
        tokens = _tokens(Grids, media, conditions)
        given = tokens_of([each.read(Puzzle).text for each in conditions])
        kept = ((given == MASK) | (given == tokens)).all(1)
        if self.config.measure == "covered":
            return _scores(kept * digits_covered(tokens).float().mean((1, 2)))
        rules = rules_kept(tokens)
        return _scores(kept * (rules.all(1) if self.config.measure == "solved" else rules.float().mean(1)))


class AdditionReward:
    """Scores sums."""

    modalities = frozenset({"text"})

    def __init__(self, config: AdditionConfig) -> None:
        self.config = config

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        """Score text i under condition i. Raises ValueError for anything but B texts."""
        tokens = _tokens(Texts, media, conditions)
        answers, expected = tokens[:, -4:], tokens_of([each.read(Sum).answer for each in conditions])
        if self.config.measure == "near":
            difference = ((answers - expected) * torch.tensor([1000, 100, 10, 1])).sum(1)
            return _scores((answers < 10).all(1) * (1 - difference.abs() / 9999))
        right = answers == expected
        return _scores(right.all(1) if self.config.measure == "exact" else right.float().mean(1))


def _tokens(kind: type[Grids] | type[Texts], media: Samples, conditions: Sequence[Condition]) -> Tensor:
    if not isinstance(media, kind) or len(media) != len(conditions):
        raise ValueError(f"{len(conditions)} {kind.__name__} were expected, not {len(media)} {type(media).__name__}")
    return media.tokens.cpu()


def _scores(values: Tensor) -> Scores:
    return Scores(values.float(), torch.ones(len(values), dtype=torch.bool))
