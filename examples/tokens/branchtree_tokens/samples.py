"""Grids and texts, drawn step by step: what is given on grey, what a step reveals on yellow, what is to come pale.

Right tokens are green and wrong ones red. Axis letters: B samples, n positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from branchtree.plugins import Condition, Media, Samples
from branchtree_tokens.tasks import RULES, Puzzle, Sum, rules_kept, text_of

CELL, MARGIN = 34, 8
GIVEN, NEW, PLAIN, EDGE, INK = "#d8d8d8", "#ffe066", "white", "#a0a0a0", "black"
GOOD, BAD = "#127a37", "#cc2222"
PALE = {GOOD: "#8fc6a2", BAD: "#e8a0a0"}
STEPS_A_SECOND = 1.0

Cell = Callable[[ImageDraw.ImageDraw, float, float, int, str], None]
"""Draws the token at a position: the column and row of its cell, the position, and its colour."""


@dataclass(frozen=True)
class Tokens(Samples):
    """Finished tokens, and when they were revealed."""

    tokens: Tensor  # (B, n) integers
    ages: Tensor  # (B, n) integers: for how many steps, the last one included, each has been known

    def film(self, texts: Sequence[str], draw: Callable[[int, Cell], Image.Image]) -> Media:
        """Return a frame for each step: ``draw`` makes one of sample i, with ``texts[i]`` given."""
        steps = max(int(self.ages.max()), 1)
        begun = steps - self.ages  # the step that revealed it, from 0
        frames = [
            [draw(i, _cell(text_of(self.tokens[i]), text, (begun[i] - step).tolist())) for step in range(steps)]
            for i, text in enumerate(texts)
        ]
        pixels = torch.from_numpy(np.stack([np.stack([np.asarray(image) for image in row]) for row in frames]))
        return Media(videos=pixels.movedim(-1, 2).float() / 255, fps=STEPS_A_SECOND)


@dataclass(frozen=True)
class Grids(Tokens):
    """Sudoku grids, row by row: n is 16."""

    modality: ClassVar[str] = "grid"

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Draw each grid; a bar at the end of each row and column, and a box's frame, say whether its rule holds."""
        kept = rules_kept(self.tokens).tolist()
        return self.film([each.read(Puzzle).text for each in conditions], lambda i, cell: _grid(kept[i], cell))


@dataclass(frozen=True)
class Texts(Tokens):
    """Sums, as ``123+456=0579``: n is 12."""

    modality: ClassVar[str] = "text"

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Draw each sum, and the right digit below one that is wrong."""
        asked = [each.read(Sum) for each in conditions]
        found = [text_of(row)[-4:] for row in self.tokens]
        return self.film([each.text for each in asked], lambda i, cell: _sum(found[i], asked[i].answer, cell))


def _cell(text: str, given: str, begun: Sequence[int]) -> Cell:
    """Return what draws the cells of one frame; ``begun`` is 0 for what this step revealed, and above for the rest."""

    def draw(on: ImageDraw.ImageDraw, column: float, row: float, position: int, ink: str) -> None:
        if given[position] != ".":
            _sign(on, column, row, text[position], INK, GIVEN)
        else:
            shade = PALE[ink] if begun[position] > 0 else ink
            _sign(on, column, row, text[position], shade, PLAIN if begun[position] else NEW)

    return draw


def _grid(kept: Sequence[bool], cell: Cell) -> Image.Image:
    image, draw = _canvas(4.5, 4.5)
    broken = {i for rule, holds in zip(RULES.tolist(), kept, strict=True) if not holds for i in rule}
    for i in range(16):
        cell(draw, i % 4, i // 4, i, BAD if i in broken else GOOD)
    for i in range(4):
        rows, columns, boxes = (GOOD if kept[first + i] else BAD for first in (0, 4, 8))
        draw.rectangle(_pixels(4.1, i + 0.1, 4.4, i + 0.9), fill=rows)
        draw.rectangle(_pixels(i + 0.1, 4.1, i + 0.9, 4.4), fill=columns)
        down, right = divmod(i, 2)
        draw.rectangle(_pixels(2 * right, 2 * down, 2 * right + 2, 2 * down + 2), outline=boxes, width=3)
    return image


def _sum(found: str, right: str, cell: Cell) -> Image.Image:
    image, draw = _canvas(7, 3)
    for position in range(8):
        cell(draw, position if position < 7 else 2, position // 7, position, INK)
    for i, (sign, expected) in enumerate(zip(found, right, strict=True)):
        cell(draw, 3 + i, 1, 8 + i, GOOD if sign == expected else BAD)
        if sign != expected:
            _sign(draw, 3 + i, 2, expected, INK, PLAIN)
    return image


def _canvas(columns: float, rows: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (int(columns * CELL) + 2 * MARGIN, int(rows * CELL) + 2 * MARGIN), PLAIN)
    return image, ImageDraw.Draw(image)


def _pixels(*cells: float) -> list[float]:
    return [MARGIN + CELL * each for each in cells]


def _sign(draw: ImageDraw.ImageDraw, column: float, row: float, sign: str, ink: str, paper: str) -> None:
    draw.rectangle(_pixels(column, row, column + 1, row + 1), fill=paper, outline=EDGE)
    x, y = _pixels(column + 0.5, row + 0.5)
    draw.text((x, y), sign, fill=ink, font=ImageFont.load_default(0.75 * CELL), anchor="mm")
