"""The model of sudokus keeps the promises that branchtree relies on, from weights that know nothing."""

import pytest
import torch

from branchtree.plugins import Condition
from branchtree.testing import AdapterCase, ModelAdapterPromises, TrainingPromises

PUZZLES = ("1" + "." * 15, "." * 15 + "2", "." * 16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
    prompts = tmp_path_factory.mktemp("prompts") / "grids.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{clues}", "clues": "{clues}"}}\n' for clues in PUZZLES))
    return AdapterCase(
        model={"adapter": "tokens_sudoku", "path": None, "width": 16, "depth": 1},
        reward={"reward": "sudoku", "measure": "covered"},
        prompts=str(prompts),
        refused=[Condition("a grid"), Condition("two ones", metadata={"clues": "11" + "." * 14})],
        overrides={
            "sampler.transition": {"name": "unmask"},
            "sampler.shift": 1.0,
            "sampler.log_prob": "sum",
            "run.sample_every": None,  # films take longer than all else
            "run.tree_every": None,
            "seed": 1,  # with which no four siblings tie
            "optim.lr": 1e-2,
        },
        states=lambda rows: torch.randint(12, (rows, 2, 16), generator=torch.Generator().manual_seed(3)),
    )


class TestSudoku(ModelAdapterPromises, TrainingPromises):
    """Nothing to add: every test is inherited."""
