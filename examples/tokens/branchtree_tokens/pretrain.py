"""Masked denoising on solved examples, stopped while mediocre: ``python -m branchtree_tokens.pretrain sudoku``.

It writes the weights that ``path: bundled`` names, or ``--output``, in float16.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from branchtree.core.grid import time_grid
from branchtree.plugins import Condition
from branchtree_tokens.data import generator, puzzles, solved_grids, sums
from branchtree_tokens.model import Addition, Sudoku, TokenConfig, TokenModel
from branchtree_tokens.rewards import AdditionConfig, AdditionReward, SudokuConfig, SudokuReward
from branchtree_tokens.tasks import MASK, Sum, tokens_of
from branchtree_tokens.unmask import Unmask

BATCH = 64


@functools.cache
def _solved() -> Tensor:
    return solved_grids(held_out=False)


def grids(source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return solved grids (B, 16), and which cells may be hidden: all."""
    solved = _solved()
    chosen = solved[torch.randint(len(solved), (BATCH,), generator=source)]
    return chosen, torch.ones_like(chosen, dtype=torch.bool)


def equations(source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return right sums (B, 12), and which positions may be hidden: the answers'."""
    pairs = sums(BATCH, False, int(torch.randint(2**31, (), generator=source)))
    texts = [Sum(a=a, b=b) for a, b in pairs]
    tokens = tokens_of([each.text[:-4] + each.answer for each in texts])
    return tokens, (torch.arange(12) >= 8).expand_as(tokens)


@torch.no_grad()
def success(model: TokenModel, conditions: list[Condition], steps: int) -> float:
    """Return the share of conditions that are solved by the likeliest tokens."""
    given, states = model.encode(conditions), torch.full((len(conditions), model.tokens), MASK)
    none, grid, kernel = torch.zeros(len(states), dtype=torch.bool), time_grid(steps), Unmask()
    for before, after in zip(grid[:-1], grid[1:], strict=True):
        sigma, following = (level.expand(len(states)) for level in (before, after))
        states = kernel(states, model.predict(states, sigma, given), sigma, following, none).sample(None)
    judge = SudokuReward(SudokuConfig(measure="solved")) if isinstance(model, Sudoku) else None
    judge_sums = AdditionReward(AdditionConfig(measure="exact"))
    return float((judge or judge_sums).score(model.decode(states), conditions).values.mean())


def pretrain(
    model: TokenModel,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    conditions: list[Condition],
    steps: int,
    until: float,
) -> None:
    """Learn to fill in what is hidden, until that share of ``conditions`` is solved in so many steps."""
    model.load(torch.device("cpu"), torch.float32, torch.float32)
    optimiser = torch.optim.AdamW(model.denoiser.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    source, solved, update = generator(0), 0.0, 0
    while solved < until:
        tokens, may_hide = draw(source)
        sigma = 0.8 * torch.rand(BATCH, generator=source)
        hidden = may_hide & (torch.rand(tokens.shape, generator=source) < sigma[:, None])
        logits = model.denoiser(tokens.masked_fill(hidden, MASK), sigma)
        loss = F.cross_entropy(logits[hidden], tokens[hidden])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update += 1
        if update % 20 == 0:
            solved = success(model, conditions, steps)
            print(f"{update} updates: loss {loss.item():.3f}, {solved:.3f} of the held-out ones solved")  # noqa: T201
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss is {loss.item()} after {update} updates")


def main() -> None:
    """Read the command line, train and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["sudoku", "addition"])
    parser.add_argument("--until", type=float, default=0.35, help="the share of held-out ones solved at which it stops")
    parser.add_argument("--output", type=Path, help="a folder; the package's own by default")
    chosen = parser.parse_args()
    config, steps = TokenConfig(path=None), {"sudoku": 5, "addition": 4}[chosen.task]
    if chosen.task == "sudoku":
        conditions = [Condition(clues, metadata={"clues": clues}) for clues in puzzles(300, True, seed=4)]
        model: TokenModel = Sudoku(config)
        pretrain(model, grids, conditions, steps, chosen.until)
    else:
        conditions = [Condition(f"{a} + {b}", metadata={"a": a, "b": b}) for a, b in sums(300, True, seed=5)]
        model = Addition(config)
        pretrain(model, equations, conditions, steps, chosen.until)
    folder = chosen.output or Path(__file__).parent / "weights" / chosen.task
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.denoiser.state_dict().items()}
    save_file(state, folder / "denoiser.safetensors")


if __name__ == "__main__":
    main()
