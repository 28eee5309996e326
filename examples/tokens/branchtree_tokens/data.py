"""Solved examples of both tasks, and the prompt files: ``python -m branchtree_tokens.data FOLDER`` writes them again.

The 288 solved 4x4 grids are divided: puzzles to train on have solutions that held-out ones never have. Each puzzle has
one solution. Sums are divided in the same way.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from branchtree_tokens.tasks import MASK, rules_kept, text_of

TRAINED = 192
"""Of the solved grids; the other 96 are held out."""


def generator(seed: int) -> torch.Generator:
    """Return a generator of that seed."""
    return torch.Generator().manual_seed(seed)


def solved_grids(held_out: bool) -> Tensor:
    """Return the solved grids of one half of the data, (192 or 96, 16), as tokens."""
    rows = list(itertools.permutations(range(1, 5)))
    halves = [pair for pair in itertools.product(rows, rows) if all(a != b for a, b in zip(*pair, strict=True))]
    pairs = torch.tensor(halves).flatten(1)
    pairs = pairs[[rules_kept(torch.cat([pair, pair])[None])[0, 8:].all().item() for pair in pairs]]
    top, bottom = (each.flatten() for each in torch.meshgrid(*[torch.arange(len(pairs))] * 2, indexing="ij"))
    grids = torch.cat([pairs[top], pairs[bottom]], 1)
    grids = grids[rules_kept(grids).all(1)]
    grids = grids[torch.randperm(len(grids), generator=generator(1))]
    return grids[TRAINED:] if held_out else grids[:TRAINED]


def puzzles(count: int, held_out: bool, seed: int) -> list[str]:
    """Return the clues of puzzles with 10 to 12 unknown cells, each with one solution."""
    source, grids = generator(seed), solved_grids(held_out)
    everything = torch.cat([solved_grids(False), solved_grids(True)])
    found: dict[str, None] = {}
    while len(found) < count:
        grid = grids[torch.randint(len(grids), (), generator=source)]
        unknown = torch.randperm(16, generator=source)[: int(torch.randint(10, 13, (), generator=source))]
        clues = grid.index_fill(0, unknown, MASK)
        if int(((clues == MASK) | (clues == everything)).all(1).sum()) == 1:
            found[text_of(clues)] = None
    return list(found)


def sums(count: int, held_out: bool, seed: int) -> list[tuple[int, int]]:
    """Return pairs of up to three digits; those held out have a sum of digits that 7 divides, the others have not."""
    source, found = generator(seed), dict[tuple[int, int], None]()
    while len(found) < count:
        a, b = torch.randint(1000, (2,), generator=source).tolist()
        if (sum(map(int, f"{a}{b}")) % 7 == 0) == held_out:
            found[a, b] = None
    return list(found)


def write_prompts(folder: Path) -> None:
    """Write the four prompt files."""
    for name, held_out, count in (("train", False, 512), ("heldout", True, 400)):
        grids = [{"prompt": clues, "clues": clues} for clues in puzzles(count, held_out, seed=2)]
        texts = [{"prompt": f"{a} + {b}", "a": a, "b": b} for a, b in sums(count, held_out, seed=3)]
        for task, rows in (("sudoku", grids), ("addition", texts)):
            (folder / f"{task}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_prompts(Path(sys.argv[1]))
