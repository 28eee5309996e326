"""The two tasks: what a condition asks, as text with a dot for each unknown token, and which answers are right.

Axis letters: B samples, n positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

VOCABULARY = "0123456789+="
MASK = len(VOCABULARY)
"""The state of a position that is not known yet."""

_CELLS = torch.arange(16).view(4, 4)
RULES = torch.cat([_CELLS, _CELLS.T, _CELLS.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)])
"""The cells of each rule, (12, 4): four rows, four columns, four boxes."""
CELLS = torch.tensor([(i // 4, i % 4, i // 8 * 2 + i % 4 // 2) for i in range(16)])
"""Row, column and box of each cell, (16, 3)."""
DIGITS = torch.tensor([(0, 3), (0, 2), (0, 1), (1, 0), (2, 3), (2, 2), (2, 1), (3, 0), (4, 4), (4, 3), (4, 2), (4, 1)])
"""Number and decimal place of each sign of a sum, (12, 2)."""


class Puzzle(BaseModel):
    """``clues``: the 16 cells of a 4x4 sudoku, row by row, a dot for each that is not given."""

    clues: str = Field(pattern=r"^[1-4.]{16}$")

    @property
    def text(self) -> str:
        """The cells."""
        return self.clues

    @model_validator(mode="after")
    def _has_no_digit_twice(self) -> Puzzle:
        for rule in RULES.tolist():
            digits = [self.clues[cell] for cell in rule if self.clues[cell] != "."]
            if len(set(digits)) < len(digits):
                raise ValueError(f"the clues {self.clues} have a digit twice in one row, column or box")
        return self


class Sum(BaseModel):
    """``a`` and ``b``: what is added, up to three digits each."""

    a: int = Field(ge=0, le=999)
    b: int = Field(ge=0, le=999)

    @property
    def text(self) -> str:
        """The question, and four unknown digits."""
        return f"{self.a:03}+{self.b:03}=...."

    @property
    def answer(self) -> str:
        """The four digits."""
        return f"{self.a + self.b:04}"


def unknown(count: int) -> Tensor:
    """Return the state in which no position is known, (2, count) int64: tokens, and steps that each has been known."""
    return torch.stack([torch.full((count,), MASK), torch.zeros(count, dtype=torch.int64)])


def tokens_of(texts: Sequence[str]) -> Tensor:
    """Return texts of one length as tokens (B, n) int64, ``MASK`` for a dot."""
    return torch.tensor([[MASK if sign == "." else VOCABULARY.index(sign) for sign in text] for text in texts])


def text_of(tokens: Tensor) -> str:
    """Return tokens (n,) as text, a dot for ``MASK``."""
    return "".join("." if token == MASK else VOCABULARY[token] for token in tokens.tolist())


def digits_covered(tokens: Tensor) -> Tensor:
    """Return which of the digits 1 to 4 each rule's cells have in grids (B, 16): (B, 12, 4) bool."""
    return (tokens[:, RULES, None] == torch.arange(1, 5)).any(2)


def rules_kept(tokens: Tensor) -> Tensor:
    """Return which rules hold in grids (B, 16): (B, 12) bool. Each wants all four digits."""
    return digits_covered(tokens).all(-1)
