"""What may change between a run and its continuation: keys are named by their innermost name, and can be allowed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import Outcome
from safetensors.torch import load_file

from branchtree import train
from branchtree.errors import CheckpointError, RecipeError
from branchtree.run.resume import differences, require_same_recipe, unused

RECIPE: dict[str, Any] = {
    "name": "mine",
    "lora": None,
    "tree": {"splits": [0, 2], "window": {"size": 4, "start": 0}},
    "rewards": [{"reward": "remote", "url": "http://one:1", "weight": 1.0}, {"reward": "clip"}],
    "optim": {"lr": 1e-4, "schedule": "constant"},
    "run": {"iterations": 10, "precision": "fp32", "checkpoint_async": False},
}


def changed(**paths: Any) -> dict[str, Any]:
    """The recipe with some places changed; ``__`` for a dot, and an index between two."""
    recipe = copy.deepcopy(RECIPE)
    for path, value in paths.items():
        *places, last = path.split("__")
        at: Any = recipe
        for place in places:
            at = at[int(place) if place.isdigit() else place]
        at[last] = value
    return recipe


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        ({"optim__lr": 1e-3}, ["optim.lr"]),
        ({"tree__window__size": 3}, ["tree.window.size"]),
        ({"tree__splits": [0, 3]}, ["tree.splits"]),  # a list of numbers is one value
        ({"rewards__0__url": "http://two:2"}, ["rewards.0.url"]),
        ({"rewards__1__scale": 2}, ["rewards.1.scale"]),
        ({"rewards": RECIPE["rewards"][:1]}, ["rewards.1"]),
        ({"lora": {"rank": 4}}, ["lora"]),
        ({"tree__window__stop": 9, "optim__lr": 1, "name": "other"}, ["name", "tree.window.stop", "optim.lr"]),
    ],
)
def test_the_innermost_key_is_named(paths: dict[str, Any], keys: list[str]) -> None:
    assert [change.key for change in differences(RECIPE, changed(**paths))] == keys


def test_what_touches_learning_is_refused_with_all_its_flags() -> None:
    now = changed(tree__window__size=3, rewards__0__url="http://two:2", name="other", run__checkpoint_async=True)
    with pytest.raises(CheckpointError) as told:
        require_same_recipe(RECIPE, now, (), Path("c"))
    message = str(told.value)
    assert "tree.window.size was 4 and is 3; rewards.0.url was" in message
    assert 'was "http://one:1" and is "http://two:2"' in message
    assert message.endswith("add --allow tree.window.size --allow rewards.0.url")
    allowed = require_same_recipe(RECIPE, now, ("tree", "rewards.0.url"), Path("c"))  # a section covers its keys
    assert [change.key for change in allowed] == ["tree.window.size", "rewards.0.url"]
    assert unused(("tree", "optim.lr"), allowed) == ["optim.lr"]


def test_a_longer_run_is_the_same_unless_the_schedule_ends_with_it() -> None:
    assert require_same_recipe(RECIPE, changed(run__iterations=20), (), Path("c")) == []
    linear = changed(optim__schedule="linear")
    with pytest.raises(CheckpointError, match=r"run\.iterations was 10 and is 20"):
        require_same_recipe(linear, changed(optim__schedule="linear", run__iterations=20), (), Path("c"))
    with pytest.raises(CheckpointError, match=r"optim\.schedule was"):
        require_same_recipe(RECIPE, linear, (), Path("c"))


def test_an_allowed_key_that_does_not_exist_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"--allow optim\.lrr: .* did you mean 'optim\.lr'"):
        require_same_recipe(RECIPE, RECIPE, ("optim.lrr",), Path("c"))
    with pytest.raises(RecipeError, match=r"--allow reward: .* did you mean 'rewards'"):
        require_same_recipe(RECIPE, RECIPE, ("reward",), Path("c"))
    require_same_recipe(RECIPE, changed(rewards__1__scale=2), ("rewards.1.scale",), Path("c"))  # one of the two has it


def test_allowing_without_resuming_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="leave it out, or add --resume"):
        train("quickstart", output=tmp_path / "run", allow=("optim.lr",))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)


def test_an_allowed_rate_is_the_one_that_is_used(
    guest: None, tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate of 1e-30, the last of five iterations leaves the weights as they were; the old rate moved them."""
    monkeypatch.setenv("COLUMNS", "1000")
    run = tmp_path / "run"
    fixed = ("train", "guest", "--output", str(run), "--no-report")
    linear = ("optim.schedule=linear", "run.checkpoint_every=2", "run.iterations=5", "optim.betas=[0.5, 0.9]")
    assert command(*fixed, *linear).code == 0
    four, five = (load_file(run / f"checkpoints/iteration_00000{n}/model/denoiser.safetensors") for n in (4, 5))
    assert not torch.equal(four["mean.weight"], five["mean.weight"])
    shutil.rmtree(run / "checkpoints/iteration_000005")
    before = (run / "metrics.jsonl").read_bytes().splitlines()
    slow = ("optim.lr=1e-30", "optim.weight_decay=0.5", "--resume", "--allow", "optim.lr")
    refused = command(*fixed, *linear, *slow)
    assert refused.code == 2 and "optim.weight_decay was 0.0 and is 0.5" in refused.err
    assert refused.err.strip().endswith("add --allow optim.weight_decay")
    done = command(*fixed, *linear, *slow, "--allow", "optim.weight_decay", "--allow", "optim.eps")
    assert done.code == 0, done.err
    assert "from iteration 4 on, optim.lr was 0.05 and is 1e-30" in done.err
    assert "--allow optim.eps: nothing changed there" in done.err
    assert torch.equal(
        load_file(run / "checkpoints/iteration_000005/model/denoiser.safetensors")["mean.weight"], four["mean.weight"]
    )
    after = (run / "metrics.jsonl").read_bytes().splitlines()
    assert after[:4] == before[:4]
    assert json.loads(after[4])["grad_norm"] == json.loads(before[4])["grad_norm"]  # the same weights to begin with
    saved = torch.load(run / "checkpoints/iteration_000005/optimizer.pt", weights_only=True)["param_groups"]
    assert [(group["initial_lr"], group["weight_decay"], group["betas"]) for group in saved] == [
        (1e-30, 0.5, (0.5, 0.9))
    ]
