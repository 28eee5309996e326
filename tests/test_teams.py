"""Processes that share their prompts' trees: who has what, what is refused, and that they learn what one learns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_rewards import Compares, Config, Plain
from forked import Python
from picky_digits import read_picky
from rich.console import Console
from safetensors.torch import load_file
from strategies import make_plan
from tiny_flux import tiny_flux
from training_runs import arguments, metrics, small, spreads, weights

from branchtree import plan, train
from branchtree.cli.display import print_plan
from branchtree.core.scores import Scores
from branchtree.core.sharing import cut
from branchtree.core.tree import grow, grow_shares
from branchtree.errors import RecipeError
from branchtree.pictures.grid import Thumbnail
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import make_schedule
from branchtree.recipe.load import load_recipe
from branchtree.training.processes import GroupRecord, Team, make_team, refuse_whole_groups

SCRIPT = Path(__file__).with_name("picky_digits.py")


def team_of(rank: int, processes: int, **batch: int) -> Team:
    recipe = load_recipe("quickstart", {f"batch.{key}": value for key, value in batch.items()})
    accelerator = SimpleNamespace(num_processes=processes, process_index=rank)
    return make_team(recipe, make_schedule(recipe), accelerator)


def test_consecutive_ranks_share_prompts() -> None:
    teams = [team_of(rank, 6, prompts=3, processes_per_prompt=3) for rank in range(6)]
    assert [team.prompts(3) for team in teams] == [slice(0, 1)] * 3 + [slice(1, 3)] * 3
    assert [team.member for team in teams] == [0, 1, 2, 0, 1, 2]
    plans = [make_plan(4, {0: 4, 1: 4})]
    assert [list(team.grow(plans).shares[0].leaves) for team in teams[:3]] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14, 15],
    ]


def test_whole_trees_are_shared_out_as_before() -> None:
    teams = [team_of(rank, 3, prompts=7) for rank in range(3)]
    assert [team.prompts(7) for team in teams] == [slice(0, 2), slice(2, 4), slice(4, 7)]
    plans = [make_plan(4, {0: 4})]
    assert all(team.grow(plans).shares[0].is_whole for team in teams)


@pytest.mark.parametrize(
    ("processes", "batch", "message"),
    [
        (
            3,
            {"processes_per_prompt": 2},
            r"batch.processes_per_prompt: 3 processes cannot form teams of 2; start a multiple of 2",
        ),
        (2, {"prompts": 1}, r"1 prompts cannot be shared by 2 processes; a larger batch.processes_per_prompt"),
        (6, {"prompts": 2, "processes_per_prompt": 2}, r"2 prompts cannot be shared by 3 teams of 2 processes"),
        (17, {"processes_per_prompt": 17}, r"17 processes cannot share the 16 leaves of a prompt"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(processes: int, batch: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        team_of(0, processes, **batch)


def test_a_reward_of_whole_groups_is_refused_where_trees_are_shared() -> None:
    rewards = [NamedReward("each", 1.0, Plain(Config())), NamedReward("spread", 1.0, Compares(Config()))]
    refuse_whole_groups(Team(1, 0, 2, 0), rewards)
    refuse_whole_groups(Team(2, 0, 1, 0), rewards[:1])
    with pytest.raises(
        RecipeError, match="'spread' compares all leaves of a prompt, but each of 2 processes has a share"
    ):
        refuse_whole_groups(Team(2, 0, 1, 0), rewards)


def test_each_team_joins_its_own_members() -> None:
    """Four processes in two teams, the second with two prompts of 3 and 5 leaves, each leaf's number in its scores."""
    plans = [[make_plan(2, {0: 4})], [make_plan(2, {0: 3}), make_plan(2, {0: 5})]]
    records = []
    for team in plans:
        for member in range(2):
            topology = grow_shares([cut(each, 2)[member] for each in team])
            numbers = torch.tensor(
                [100.0 * len(part.held[2]) + leaf for part in topology.shares for leaf in part.leaves]
            )
            scores = {"r": Scores(numbers, torch.ones(len(numbers), dtype=torch.bool))}
            log_prob = [torch.full((topology.width(depth),), float(len(records))) for depth in topology.depths]
            records.append(GroupRecord(topology, log_prob, scores, [Thumbnail(bytes([len(records)]), ".png")]))
    whole = Team(2, 0, 2, 1).whole(records)
    assert whole.topology.plans == tuple(plans[1])
    assert whole.scores["r"].values.tolist() == [100, 201, 202, 200, 201, 302, 303, 304]
    assert whole.log_prob[2].tolist() == [2, 3, 3, 2, 2, 3, 3, 3]
    assert whole.log_prob[0].tolist() == [2, 2]  # the roots' owner has the first leaf
    assert [thumbnail.content for thumbnail in whole.thumbnails] == [b"\x02", b"\x03"]
    assert Team(2, 1, 2, 0).whole(records).topology.plans == grow(plans[0]).plans


# Runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def run_shared(processes: int, overrides: dict[str, Any], output: Path) -> None:
    command = [
        str(SCRIPT), str(processes), "train", "quickstart", *arguments(overrides),
        f"batch.processes_per_prompt={processes}", "--output", str(output), "--no-report",
    ]  # fmt: skip
    done = Python(*command)
    assert done.ended() == 0, done.out + done.err


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(first[name] - second[name]).double().norm() for name in first]).norm())


# Leaves split 5, 5, 6, through families of 4; some cannot be read, others by each process.
UNEVEN = {"tree__splits": [0, 2], "tree__branches": 4, "tree__siblings": "simplex"}
PRUNED = {"tree__splits": [0, 1, 2, 3], "pruning__kind": "parent_top1", "optim__steps_per_iteration": 2}
PRUNED |= {"credit__batch_normalise": True}


@pytest.mark.parametrize(("processes", "changes"), [(2, PRUNED), (3, UNEVEN)], ids=["pruned", "uneven and masked"])
def test_processes_that_share_a_tree_learn_what_one_learns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, changes: dict[str, object]
) -> None:
    overrides = small(model, batch__prompts=1, run__tree_every=1, scoring__max_invalid=1.0, **changes)
    read_picky(monkeypatch.setattr)
    train("quickstart", overrides, output=tmp_path / "one")
    run_shared(processes, overrides, tmp_path / "shared")
    one, shared = metrics(tmp_path / "one"), metrics(tmp_path / "shared")
    assert 0 < one[0]["reward/valid_fraction"] < 1
    for iteration, (first, second) in enumerate(zip(one, shared, strict=True)):
        assert first.keys() == second.keys()
        for name in (name for name in first if not name.startswith(("log_prob/", "ratio/", "rows/"))):
            # Updates amplify rounding, and so does a component of variance, a difference of sums.
            rounding = 1e-4 if iteration or name.startswith("variance/") else 1e-5
            assert second[name] == pytest.approx(first[name], rel=rounding, abs=1e-6), name
        assert second["rows/rollout"] > first["rows/rollout"]  # what is computed twice is counted twice
    assert spreads(tmp_path / "shared") == pytest.approx(spreads(tmp_path / "one"), rel=1e-4)
    start = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "shared")
    size = float(torch.stack([value.double().norm() for value in start.values()]).norm())
    assert distance(first, second) < 1e-5 * size
    assert distance(first, second) < 2e-3 * distance(first, start)
    trees = [json.loads((tmp_path / run / "trees/iteration_000000.json").read_text()) for run in ("one", "shared")]
    assert [leaf["thumbnail"] for leaf in trees[1]["leaves"]] == [leaf["thumbnail"] for leaf in trees[0]["leaves"]]
    for leaf in trees[1]["leaves"]:
        assert (tmp_path / "shared/trees" / leaf["thumbnail"]).read_bytes().startswith(b"\x89PNG")


def test_the_plan_tells_what_each_process_does() -> None:
    # Dense without splits before step 3 of 20: root and its chain, 8 leaves below each of the first split's children.
    shared = plan("quickstart", {"tree.splits": [3, 6, 9, 12], "batch.processes_per_prompt": 2})
    rows = 4 + 3 * 1 + 3 * 2 + 3 * 4 + 7 * 8
    assert [(share.leaves, share.rollout_rows) for share in shared.shares] == [(8, rows)] * 2
    console = Console(file=io.StringIO(), width=400)
    print_plan(console, shared)
    assert f"at most 8 leaves and {rows} rollout predictions for each, {2 * rows} in all" in console.file.getvalue()
    console = Console(file=io.StringIO(), width=400)
    print_plan(console, plan("quickstart"))
    assert "Shared by" not in console.file.getvalue()
    with pytest.raises(RecipeError, match="17 processes cannot share the 16 leaves"):
        plan("quickstart", {"batch.processes_per_prompt": 17})
