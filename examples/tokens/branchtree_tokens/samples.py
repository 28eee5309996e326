"""Grids and texts, and how they are drawn: given tokens on grey, right ones green, wrong ones red."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from branchtree.plugins import Condition, Media, Samples
from branchtree_tokens.tasks import RULES, Puzzle, Sum, read, rules_kept, text_of

CELL = 20
GIVEN, PLAIN, INK = "#d8d8d8", "white", "black"
GOOD, BAD = "#2a9d4a", "#d03030"


@dataclass(frozen=True)
class Grids(Samples):
    """Sudoku grids, row by row."""

    tokens: Tensor  # (B, 16) integers

    modality = "grid"

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Draw each grid; a bar at the end of each row and column, and a box's frame, say whether its rule holds."""
        kept = rules_kept(self.tokens)
        pairs = zip(self.tokens, kept, conditions, strict=True)
        return _media([_grid(text_of(row), rules.tolist(), read(Puzzle, each).text) for row, rules, each in pairs])


@dataclass(frozen=True)
class Texts(Samples):
    """Sums, as ``123+456=0579``."""

    tokens: Tensor  # (B, 12) integers

    modality = "text"

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Draw each sum, and the right answer below one that is wrong."""
        return _media([_sum(text_of(row), read(Sum, each)) for row, each in zip(self.tokens, conditions, strict=True)])


def _grid(text: str, kept: Sequence[bool], given: str) -> Image.Image:
    image, draw = _canvas(4.5, 4.5)
    broken = {cell for rule, holds in zip(RULES.tolist(), kept, strict=True) if not holds for cell in rule}
    for cell, sign in enumerate(text):
        row, column = divmod(cell, 4)
        clue = given[cell] != "."
        ink = INK if clue else BAD if cell in broken else GOOD
        _cell(draw, column, row, sign, ink, GIVEN if clue else PLAIN)
    for i in range(4):
        rows, columns, boxes = (GOOD if kept[first + i] else BAD for first in (0, 4, 8))
        draw.rectangle(_box(4.1, i + 0.1, 4.4, i + 0.9), fill=rows)
        draw.rectangle(_box(i + 0.1, 4.1, i + 0.9, 4.4), fill=columns)
        down, right = divmod(i, 2)
        draw.rectangle(_box(2 * right, 2 * down, 2 * right + 2, 2 * down + 2), outline=boxes, width=2)
    return image


def _sum(text: str, question: Sum) -> Image.Image:
    image, draw = _canvas(12, 2)
    right = question.text[:-4] + question.answer
    for i, sign in enumerate(text):
        clue = question.text[i] != "."
        wrong = sign != right[i]
        _cell(draw, i, 0, sign, INK if clue else BAD if wrong else GOOD, GIVEN if clue else PLAIN)
        if wrong:
            _cell(draw, i, 1, right[i], INK, PLAIN)
    return image


def _canvas(columns: float, rows: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (int(columns * CELL) + 4, int(rows * CELL) + 4), PLAIN)
    return image, ImageDraw.Draw(image)


def _box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return (2 + left * CELL, 2 + top * CELL, 2 + right * CELL, 2 + bottom * CELL)


def _cell(draw: ImageDraw.ImageDraw, column: int, row: int, sign: str, ink: str, paper: str) -> None:
    draw.rectangle(_box(column, row, column + 1, row + 1), fill=paper, outline="#a0a0a0")
    centre = (2 + (column + 0.5) * CELL, 2 + (row + 0.5) * CELL)
    draw.text(centre, sign, fill=ink, font=ImageFont.load_default(14), anchor="mm")


def _media(images: Sequence[Image.Image]) -> Media:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return Media(images=pixels.permute(0, 3, 1, 2).float() / 255)
