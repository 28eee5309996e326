"""The model of sums keeps the promises that branchtree relies on, from weights that know nothing."""

import pytest
import torch

from branchtree.plugins import Condition
from branchtree.testing import AdapterCase, ModelAdapterPromises, TrainingPromises


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
    prompts = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{a} + 7", "a": {a}, "b": 7}}\n' for a in (12, 345, 678)))
    return AdapterCase(
        model={"adapter": "tokens_addition", "path": None, "width": 16, "depth": 1},
        reward={"reward": "addition", "measure": "near"},
        prompts=str(prompts),
        refused=[Condition("one and one"), Condition("a + 7", metadata={"a": "a", "b": 7})],
        overrides={
            "sampler.transition": {"name": "unmask"},
            "sampler.shift": 1.0,
            "sampler.log_prob": "sum",
            "run.sample_every": None,  # films take longer than all else
            "run.tree_every": None,
            "tree.draw": {"first": 0.25, "last": 0.26},  # of twelve steps for four digits, one that reveals a digit
            "optim.lr": 1e-2,
        },
        states=lambda rows: torch.randint(12, (rows, 2, 12), generator=torch.Generator().manual_seed(3)),
    )


class TestAddition(ModelAdapterPromises, TrainingPromises):
    """Nothing to add: every test is inherited."""
