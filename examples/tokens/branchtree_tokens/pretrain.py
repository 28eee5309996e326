"""Masked denoising on solved examples, stopped while mediocre: ``python -m branchtree_tokens.pretrain sudoku``.

It writes the weights that ``path: bundled`` names, or ``--output``, in float16.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from branchtree.core.grid import time_grid
from branchtree.plugins import Condition
from branchtree_tokens.data import generator, puzzles, solved_grids, sums
from branchtree_tokens.model import Addition, Sudoku, TokenConfig, TokenModel
from branchtree_tokens.rewards import AdditionConfig, AdditionReward, SudokuConfig, SudokuReward
from branchtree_tokens.tasks import MASK, Sum, tokens_of, unknown
from branchtree_tokens.unmask import Unmask

BATCH = 64


@dataclass(frozen=True)
class Course:
    """How one task is learned, and what is held out."""

    model: TokenModel
    judge: Any
    conditions: list[Condition]
    draw: Callable[[torch.Generator], Tensor]  # solved examples (B, n)
    may_hide: Tensor  # (n,) bool
    hidden: float  # the largest share of those that is hidden
    steps: int  # of denoising, as in the recipe
    every: int  # updates between looks at what is held out


def sudoku() -> Course:
    """Up to a quarter of a grid is hidden: less than half of what a puzzle leaves open."""
    solved = solved_grids(held_out=False)
    asked = [Condition(clues, metadata={"clues": clues}) for clues in puzzles(300, held_out=True, seed=4)]
    judge = SudokuReward(SudokuConfig(measure="solved"))

    def draw(source: torch.Generator) -> Tensor:
        return solved[torch.randint(len(solved), (BATCH,), generator=source)]

    everywhere = torch.ones(16, dtype=torch.bool)
    return Course(Sudoku(TokenConfig(path=None)), judge, asked, draw, everywhere, hidden=0.25, steps=5, every=50)


def addition() -> Course:
    """Digits of the answer are hidden."""
    asked = [Condition(f"{a} + {b}", metadata={"a": a, "b": b}) for a, b in sums(300, held_out=True, seed=5)]
    judge = AdditionReward(AdditionConfig(measure="exact"))

    def draw(source: torch.Generator) -> Tensor:
        pairs = sums(BATCH, False, int(torch.randint(2**31, (), generator=source)))
        examples = [Sum(a=a, b=b) for a, b in pairs]
        return tokens_of([each.text[:-4] + each.answer for each in examples])

    answer = torch.arange(12) >= 8
    return Course(Addition(TokenConfig(path=None)), judge, asked, draw, answer, hidden=0.8, steps=4, every=20)


@torch.no_grad()
def success(course: Course) -> float:
    """Return the share of what is held out that the likeliest tokens solve."""
    model, count = course.model, len(course.conditions)
    given, states, grid = (
        model.encode(course.conditions),
        unknown(model.tokens).expand(count, -1, -1),
        time_grid(course.steps),
    )
    for before, after in itertools.pairwise(grid):
        sigma, following = before.expand(count), after.expand(count)
        logits = model.predict(states, sigma, given)
        states = Unmask()(states, logits, sigma, following, torch.zeros(count, dtype=torch.bool)).sample(None)
    return float(course.judge.score(model.decode(states), course.conditions).values.mean())


def pretrain(course: Course, until: float) -> None:
    """Learn to fill in what is hidden, until that share of what is held out is solved."""
    course.model.load(torch.device("cpu"), torch.float32, torch.float32)
    denoiser = course.model.denoiser
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    source, solved, update = generator(0), 0.0, 0
    while solved < until:
        tokens = course.draw(source)
        sigma = course.hidden * torch.rand(BATCH, generator=source)
        hidden = course.may_hide & (torch.rand(tokens.shape, generator=source) < sigma[:, None])
        logits = denoiser(tokens.masked_fill(hidden, MASK), sigma)
        loss = F.cross_entropy(logits[hidden], tokens[hidden])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update += 1
        if update % course.every == 0:
            solved = success(course)
            print(f"{update} updates: loss {loss.item():.3f}, {solved:.3f} of the held-out ones solved")  # noqa: T201


def main() -> None:
    """Read the command line, train and write."""
    courses = {"sudoku": sudoku, "addition": addition}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(courses))
    parser.add_argument("--until", type=float, default=0.35, help="the share of held-out ones solved at which it stops")
    parser.add_argument("--output", type=Path, help="a folder; the package's own by default")
    chosen = parser.parse_args()
    course = courses[chosen.task]()
    pretrain(course, chosen.until)
    folder = chosen.output or Path(__file__).parent / "weights" / chosen.task
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in course.model.denoiser.state_dict().items()}
    save_file(state, folder / "denoiser.safetensors")


if __name__ == "__main__":
    main()
