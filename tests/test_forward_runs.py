"""Runs under forward objectives: they train, do the work that is planned, resume to the byte, and share prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Python
from guests import run_command
from picky_digits import read_picky
from sessions import Prompts
from sessions import grown as grown_by_session
from tiny_flux import tiny_flux
from torch import nn
from training_runs import arguments, largest_difference, metrics, small, weights

from branchtree import load_recipe, plan, train
from branchtree.errors import BranchTreeError, RecipeError
from branchtree.recipe.build import make_forward_loss
from branchtree.run.directory import RunDirectory
from branchtree.testing.probe import counted_rows, require_equal
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import iterate
from branchtree.training.loading import make_accelerator, open_session, refuse_apart
from branchtree.training.metrics import gather_metrics
from branchtree.training.session import Session

SCRIPT = Path(__file__).with_name("picky_digits.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


def opened(recipe: str, overrides: dict[str, Any], folder: Path) -> Session:
    loaded = load_recipe(recipe, overrides)
    directory = RunDirectory(folder)
    directory.claim(resume=False)
    return open_session(read_inputs(loaded), directory, make_accelerator(loaded))


KINDS: dict[str, dict[str, Any]] = {
    "nft": {"loss__old_policy": "ema", "optim__ema": 0.5, "loss__kl": 0.1, "lora__rank": 2},
    "awm": {"optim__steps_per_iteration": 2, "loss__kl_old": 0.1, "batch__states": "host"},
    "vgrpo": {"run__precision": "bf16", "lora__rank": 2, "batch__update_rows": 3},
    "crd": {"optim__steps_per_iteration": 2, "loss__share_draws": "siblings", "batch__update_rows": 3},
}
"""Each objective under other keys, so that all are run once."""
TREE: dict[str, Any] = {"tree__splits": "single", "tree__branches": 4, "loss__draws": 2, "optim__lr": 1e-3}


def changed(model: Path, kind: str, **more: Any) -> dict[str, Any]:
    return small(model, loss__kind=kind, **{**TREE, **KINDS[kind], **more})


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations by the command line for each objective."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        done = run_command(
            "train", "quickstart", *arguments(changed(model, kind)), "--output", str(root / kind), "--no-report"
        )
        assert done.code == 0, done.err
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_trains_and_says_what_it_saw(kind: str, runs: Path) -> None:
    rows = metrics(runs / kind)
    steps = KINDS[kind].get("optim__steps_per_iteration", 1)
    for row in rows:
        assert row["steps/taken"] == steps and row["grad_norm"] > 0
        assert row["edges/trained"] == row["rows/gradient"] == 2 * 4 * 2  # prompts, leaves, draws
        assert row["forward/error"] > 0
        assert {name for name in row if name.startswith("loss_share/")} == {"loss_share/depth_06"}
        assert not any(name.startswith("log_prob/") for name in row)
        assert ("ratio/max_deviation" in row) == (kind in {"awm", "vgrpo"})
        assert row.get("ratio/first_step_max_deviation", 0) == 0
        assert ("forward/preference_spread" in row) == (kind == "nft")
    assert ("kl" in rows[0]) == (kind == "nft")
    if kind == "awm":
        assert rows[0]["ratio/max_deviation"] > 0  # in the second step


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_of_the_plan_and_of_the_model(kind: str, model: Path, tmp_path: Path) -> None:
    overrides = changed(model, kind, run__iterations=1)
    planned, session = plan("quickstart", overrides), opened("quickstart", overrides, tmp_path / "run")
    with counted_rows(session.inputs.model.denoiser) as rows, counted_rows(session.old or nn.Module()) as old:
        row = gather_metrics(session, iterate(session, 0))
    assert row["rows/rollout"] == planned.rollout_rows
    assert row["rows/gradient"] == planned.gradient_rows == rows.gradient
    assert row["rows/rescored"] == planned.rescored_rows == {"nft": 16, "awm": 8, "vgrpo": 0, "crd": 16}[kind]
    assert row["rows/reference"] == (16 if kind == "nft" else 0)
    assert rows.rollout + old.rollout == row["rows/rollout"] + row["rows/reference"] + row["rows/rescored"]


@pytest.mark.parametrize("kind", ["nft", "crd"])
def test_a_resumed_run_is_the_same_to_the_byte(kind: str, runs: Path, model: Path, tmp_path: Path) -> None:
    train("quickstart", changed(model, kind, run__iterations=1), output=tmp_path / "run")
    train("quickstart", changed(model, kind), output=tmp_path / "run", resume=True, allow=["run.iterations"])
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (runs / kind / "metrics.jsonl").read_bytes()
    require_equal(weights(tmp_path / "run"), weights(runs / kind))


def test_batches_change_nothing_but_rounding(runs: Path, model: Path, tmp_path: Path) -> None:
    rows = {"batch__update_rows": None, "batch__rollout_rows": 3}
    train("quickstart", changed(model, "crd", **rows), output=tmp_path / "run")
    for first, second in zip(metrics(runs / "crd"), metrics(tmp_path / "run"), strict=True):
        assert second == pytest.approx(first, rel=1e-3, abs=1e-5)
    assert largest_difference(weights(tmp_path / "run"), weights(runs / "crd")) < 1e-4


def test_processes_that_share_a_tree_learn_what_one_learns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small(model, loss__kind="crd", loss__share_draws="siblings", loss__draws=2, batch__prompts=1,
                      scoring__max_invalid=1.0, tree__splits=[0, 2], tree__branches=3)  # fmt: skip
    read_picky(monkeypatch.setattr)
    train("quickstart", overrides, output=tmp_path / "one")
    command = [str(SCRIPT), "2", "train", "quickstart", *arguments(overrides), "batch.processes_per_prompt=2",
               "--output", str(tmp_path / "shared"), "--no-report"]  # fmt: skip
    done = Python(*command)
    assert done.ended() == 0, done.out + done.err
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "shared"), strict=True):
        assert first.keys() == second.keys()
        for name in ("rows/gradient", "edges/trained", "loss", "forward/error", "grad_norm", "reward/digits/mean"):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "shared")) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss.objective": {"name": "clipped"}}, r"loss\.objective: under the forward objective 'nft' leaves are"),
        ({"loss.weighting": "noise"}, r"loss\.weighting: .* set it to none"),
        ({"pruning.kind": "depth"}, r"pruning\.kind: .* set it to none"),
        ({"loss.old_policy": "ema"}, r"loss\.old_policy: ema .* set optim\.ema"),
        ({"tree.splits": []}, r"tree\.splits: 'nft' compares leaves, and this tree has only one; give it a split"),
        ({"loss.forward": {"name": "nothing"}}, r"no forward objective 'nothing' is installed"),
        ({"loss.kind": "ntf"}, r"loss\.kind"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BranchTreeError, match=message):
        plan("quickstart", {"loss.kind": "nft", **changes})


@pytest.mark.parametrize(
    ("changes", "members", "joint", "message"),
    [
        ({"loss.old_policy": "ema", "optim.ema": 0.9}, 1, True, r"loss\.old_policy: .* do not shard them"),
        ({"optim.steps_per_iteration": 2}, 2, False, r"loss\.kind: 'crd' .* 2 processes share each prompt's leaves"),
        ({"optim.steps_per_iteration": 2}, 1, True, r"loss\.kind: 'crd' .* weights are sharded"),
        ({"loss.old_policy": "ema", "optim.ema": 0.9}, 2, False, r"set optim\.steps_per_iteration to 1"),
        ({}, 2, True, None),
        ({"optim.steps_per_iteration": 2}, 1, False, None),
        ({"optim.steps_per_iteration": 2, "loss.kind": "awm"}, 2, True, None),
    ],
)
def test_what_is_spread_over_processes_is_refused(
    changes: dict[str, Any], members: int, joint: bool, message: str | None
) -> None:
    recipe = load_recipe("quickstart", {"loss.kind": "crd", **changes})
    rule: Any = make_forward_loss(recipe)
    team: Any = SimpleNamespace(members=members)
    engine: Any = SimpleNamespace(joint=joint)
    if message is None:
        refuse_apart(recipe, rule, team, engine)
        return
    with pytest.raises(RecipeError, match=message):
        refuse_apart(recipe, rule, team, engine)


def test_an_objective_changes_the_keys_that_it_says_and_a_recipe_changes_them_back(tmp_path: Path) -> None:
    loss = load_recipe("quickstart", {"loss.kind": "vgrpo"}).loss
    assert (loss.share_draws, loss.error) == ("group", "adaptive")
    again = load_recipe(load_recipe("quickstart", {"loss.kind": "vgrpo"}), {"loss.kind": "awm"}).loss
    assert (again.share_draws, again.error) == ("leaf", "velocity")
    own = load_recipe("quickstart", {"loss.kind": "vgrpo", "loss.error": "velocity"}).loss
    assert (own.share_draws, own.error) == ("group", "velocity")


def test_a_batch_is_normalised_over_the_leaves_that_are_trained(model: Path, tmp_path: Path) -> None:
    """Not over the edges of the tree, which no forward objective trains."""
    tree = {"tree__splits": [0, 2], "tree__branches": 2, "credit__batch_normalise": True}
    session = opened("quickstart", small(model, loss__kind="awm", **tree), tmp_path / "run")
    advantages = iterate(session, 0).credit.advantages[-1]
    trained = advantages[advantages != 0]
    assert len(trained) == 8
    assert float(trained.mean()) == pytest.approx(0, abs=1e-9) and float(trained.std()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("method", ["nft", "awm", "vgrpo", "crd"])
def test_a_preset_goes_with_any_tree_in_any_order(method: str) -> None:
    after, before = load_recipe(f"quickstart+single+{method}"), load_recipe(f"quickstart+{method}+single")
    assert (after.tree, after.loss, after.credit) == (before.tree, before.loss, before.credit)
    assert after.loss.kind == method
    assert (
        after.loss.model_copy(update={"clip_range": 1e-4})
        == load_recipe("quickstart", {"loss.kind": method, "loss.clip_range": 1e-4}).loss
    )  # a preset writes out the objective's own defaults


def test_leaves_of_the_ode_begin_with_noises_of_their_own(model: Path, tmp_path: Path) -> None:
    """After the first step the states' noises are as good as independent, and no other step is stochastic."""
    overrides = {key: value for key, value in small(model).items() if not key.startswith(("tree.", "sampler."))}
    session = opened("quickstart+ode+awm", {**overrides, "tree.steps": 6}, tmp_path / "run")
    prompts = Prompts.of(session, 0)
    assert [plan.stochastic for plan in prompts.batch.topology.plans] == [(True, *[False] * 5)] * 2
    tree, _ = grown_by_session(session, 0, prompts)
    states = tree.states[1].flatten(1)
    together = torch.corrcoef(states.view(2, 16, -1)[0]) - torch.eye(16)
    assert float(together.abs().max()) < 5 / states.shape[1] ** 0.5
    assert float(states.std()) == pytest.approx(float(tree.sigmas[1]), rel=0.1)
