"""What a run learns from: ties, schedules of steps that were not taken, a KL term, averages, rewards without weight."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from sessions import Prompts, credited, grown
from torch import nn
from training_runs import metrics

import branchtree
from branchtree import load_recipe
from branchtree.core.scores import Scores
from branchtree.errors import RecipeError, RewardError
from branchtree.plugins import Condition, Media
from branchtree.plugins.scores import NamedReward, ask
from branchtree.run.directory import RunDirectory
from branchtree.run.manifest import write_manifest
from branchtree.run.resume import find_checkpoint
from branchtree.training.engine import WeightAverage
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.session import Session
from branchtree.training.trainer import Trainer


@pytest.fixture(autouse=True)
def guest(guest_site: Path, plug: Callable[[Path], None]) -> None:
    """The plug-in whose model takes a millisecond."""
    plug(guest_site)


SMALL: dict[str, Any] = {"callbacks": [], "evaluation": None, "run.sample_every": 1000, "run.tree_every": 1000}
LEAVES = 8
"""Of a prompt's tree."""


@dataclass
class Judge:
    """A reward that gives each prompt's leaves these values in turn, or whatever ``answer`` makes of the samples."""

    values: Sequence[float] = ()
    answer: Callable[[Media], Any] | None = None
    modalities: frozenset[str] = frozenset({"image"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Any:
        if self.answer is not None:
            return self.answer(media)
        values = torch.tensor([self.values[place % len(self.values)] for place in range(len(media))])
        return Scores(values, values.isfinite())


def opened(
    output: Path, rewards: Sequence[NamedReward] | None = None, resume: bool = False, **overrides: Any
) -> Session:
    """A session of the recipe ``guest``, under other rewards where they are given."""
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    recipe = load_recipe("guest", {**SMALL, **changed})
    inputs = read_inputs(recipe)
    if rewards is not None:
        inputs = replace(inputs, rewards=list(rewards))
    directory = RunDirectory(output)
    directory.claim(resume)
    allowed = ["run.iterations"] if resume else []
    checkpoint = find_checkpoint(directory.checkpoints, recipe, allowed) if resume else None
    return open_session(inputs, directory, make_accelerator(recipe), checkpoint)


def trained(
    output: Path, rewards: Sequence[NamedReward] | None = None, resume: bool = False, **overrides: Any
) -> list[dict[str, float]]:
    """The metrics of a run of such a session."""
    session = opened(output, rewards, resume, **overrides)
    Trainer(session, []).run(resume, ["run.iterations"] if resume else [])
    return metrics(output)


def judged(*values: float) -> list[NamedReward]:
    return [NamedReward("judge", 1.0, Judge(values))]


APART = (0.1, 0.7, 0.2, 0.4, 0.9, 0.3, 0.8, 0.5)
CLOSE = (-0.767, float(torch.nextafter(torch.tensor(-0.767), torch.tensor(0.0))))


# --- ties ---


@pytest.mark.parametrize("advantage", ["depth", "leaf", "sibling"])
def test_scores_that_only_rounding_tells_apart_train_nothing_and_are_counted(advantage: str, tmp_path: Path) -> None:
    row = trained(tmp_path / "run", judged(*CLOSE), run__iterations=1, credit__advantage=advantage)[0]
    assert row["reward/judge/tied_prompts"] == 2
    assert [row[f"ties/split_{place}"] for place in range(3)] == [1, 1, 1]
    assert (row["edges/trained"], row["steps/taken"], row["steps/skipped"]) == (0, 0, 1)
    assert "variance/share/split_0" not in row


def test_scores_that_differ_are_no_ties(tmp_path: Path) -> None:
    row = trained(tmp_path / "run", judged(*APART), run__iterations=1)[0]
    assert (row["reward/judge/tied_prompts"], row["ties/split_2"], row["steps/taken"]) == (0, 0, 1)


def test_noise_below_what_float32_tells_apart_trains_nothing(tmp_path: Path) -> None:
    """Siblings of an all but deterministic step have the same reward, but for its last digits."""
    shape = {"tree__steps": 20, "tree__splits": [0, 3, 6, 9]}
    row = trained(tmp_path / "run", run__iterations=1, sampler__eta=1e-7, **shape)[0]
    assert row["reward/guest_brightness/tied_prompts"] == 2
    assert (row["steps/taken"], row["edges/trained"]) == (0, 0)


# --- the learning rate ---


@pytest.mark.parametrize(("schedule", "why"), [("linear", "skipped"), ("cosine", "refused")])
def test_a_schedule_ends_with_the_run_whatever_becomes_of_its_steps(schedule: str, why: str, tmp_path: Path) -> None:
    """The rates are those of a run in which every step is taken, down to 0."""
    settings = {"run__iterations": 4, "optim__schedule": schedule, "optim__steps_per_iteration": 2}
    whole = trained(tmp_path / "whole", judged(*APART), **settings)
    if why == "skipped":
        rows = trained(tmp_path / "run", judged(0.5), **settings)
        assert [row["steps/skipped"] for row in rows] == [2] * 4
    else:
        refusing = {"optim__refuse_above": 1e-12, "optim__max_refused": 100}
        rows = trained(tmp_path / "run", judged(*APART), **settings, **refusing)
        assert [row["steps/refused"] for row in rows] == [2] * 4
    assert [row["steps/taken"] for row in whole] == [2] * 4
    assert [row["lr"] for row in rows] == [row["lr"] for row in whole]
    assert rows[-1]["lr"] == 0


def rewritten(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint's state says."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def test_a_schedule_goes_on_where_the_iterations_stand(tmp_path: Path) -> None:
    """Also from a checkpoint of before, which counts the steps that were taken."""
    settings = {"optim__schedule": "linear", "run__checkpoint_every": 2, "optim__ema": 0.9}
    whole = trained(tmp_path / "whole", judged(0.5), run__iterations=4, **settings)
    rows = trained(tmp_path / "run", judged(0.5), run__iterations=2, **settings)
    assert rows[-1]["lr"] == 0

    def as_before(state: dict[str, Any]) -> None:
        del state["average_steps"]
        state["scheduler"] = {"base_lrs": [0.05], "last_epoch": 0, "_step_count": 1, "_last_lr": [0.05]}

    rewritten(tmp_path / "run/checkpoints/iteration_000002", as_before)
    rows = trained(tmp_path / "run", judged(0.5), resume=True, run__iterations=4, **settings)
    assert [row["lr"] for row in rows[2:]] == [row["lr"] for row in whole[2:]]


def test_a_warm_up_that_outlasts_the_run_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a plan and by training alike; one as long as the run is not."""
    overrides = {"run.iterations": 2, "optim.steps_per_iteration": 2, "evaluation": None}
    for warmup, uses in ((5, 1), (4, 0)):
        changes = {**overrides, "optim.warmup": warmup}
        for use in (branchtree.plan, partial(branchtree.train, output=tmp_path / str(warmup))):
            caplog.clear()
            use("guest", overrides=changes)
            assert caplog.text.count("optim.warmup: the learning rate rises over 5 optimiser steps") == uses


# --- the KL term ---


def test_a_kl_term_acts_on_edges_without_an_advantage(tmp_path: Path) -> None:
    """All rewards tie: the step is that of the KL alone, and its rows are those of the plan."""
    settings = {"run__iterations": 1, "batch__prompts": 2}
    rows = trained(tmp_path / "kl", judged(0.5), loss__kl=0.1, **settings)
    plan = branchtree.plan("guest", overrides={**SMALL, "loss.kl": 0.1})
    assert rows[0]["edges/trained"] == plan.iteration.trained_edges
    assert rows[0]["rows/gradient"] == rows[0]["rows/reference"] == plan.gradient_rows
    assert (rows[0]["steps/taken"], rows[0]["loss"], rows[0]["ratio/clipped_fraction"]) == (1, 0, 0)
    measured = trained(tmp_path / "measured", judged(0.5), loss__kl_every=1, **settings)[0]
    assert (measured["edges/trained"], measured["steps/taken"]) == (0, 0)  # without a weight it asks for nothing


@pytest.mark.parametrize("value", [0.5, math.nan], ids=["tied", "masked"])
def test_the_gradient_of_the_kl_is_that_of_its_mean_over_all_kept_edges(value: float, tmp_path: Path) -> None:
    """The policy has left its start; against torch's own gradient of the mean over every stochastic edge."""
    session = opened(tmp_path / "run", judged(value), loss__kl=2.0)
    engine, sampler = session.updater.engine, session.sampler
    with torch.no_grad():
        for parameter in engine.parameters.values():
            parameter.add_(0.1)
    prompts = Prompts.of(session, 0)
    tree, scores = grown(session, 0, prompts)
    families, policies = credited(session, 0, tree, scores), session.policies(prompts.policy, 0)
    gradient = session.updater.begin(tree, policies)
    gradient.add(families)
    gradient.finish(0)
    engine.scale(1 / families.edges)
    found = [parameter.grad.clone() for parameter in engine.parameters.values() if parameter.grad is not None]
    engine.discard()
    assert policies.reference is not None
    total, edges = torch.zeros(()), 0
    for step in range(tree.topology.steps - 1):
        states, roots = tree.states[step], tree.topology.root[step]
        depth, sigma = torch.full((len(roots),), step), tree.sigmas[step].expand(len(roots))
        active = torch.ones(len(roots), dtype=torch.bool)
        mine, start = (
            sampler.transition(states, policy(states, sigma, roots), depth, active)
            for policy in (policies.trained, policies.reference)
        )
        children = torch.bincount(tree.topology.parent[step + 1], minlength=len(roots))
        total = total + (mine.kl(start, sampler.reduction) * children).sum()
        edges += int(children.sum())
    assert families.edges == edges
    expected = torch.autograd.grad(2.0 * total / edges, list(engine.parameters.values()))
    assert float(expected[0].abs().max()) > 0
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


# --- averages ---


def test_the_average_is_that_of_diffusers() -> None:
    weight, theirs_of = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    average, theirs = WeightAverage({"w": weight}, decay=0.75), EMAModel([theirs_of], decay=0.75)
    for step in range(60):  # the warm-up ends at (1 + n) / (10 + n) = 0.75, after 26 steps
        with torch.no_grad():
            for parameter in (weight, theirs_of):
                parameter.fill_(math.sin(step))
        average.update()
        theirs.step([theirs_of])
        assert average.state()["w"].item() == pytest.approx(theirs.shadow_params[0].item(), abs=1e-6)


def test_an_average_of_a_short_run_is_not_the_base_model(tmp_path: Path) -> None:
    """After 10 steps at a decay of .9999 it has gone most of the way; and a resume changes nothing."""
    settings = {"optim__ema": 0.9999, "run__checkpoint_every": 5}
    session = opened(tmp_path / "whole", run__iterations=10, **settings)
    start = {name: value.detach().clone() for name, value in session.updater.engine.parameters.items()}
    Trainer(session, []).run(resume=False)
    assert session.trained.average is not None
    average = session.trained.average.state()
    for name, value in session.updater.engine.parameters.items():
        moved = float((value.detach() - start[name]).norm())
        assert float((average[name] - start[name]).norm()) > 0.5 * moved > 0
    trained(tmp_path / "run", run__iterations=5, **settings)
    resumed = opened(tmp_path / "run", resume=True, run__iterations=10, **settings)
    Trainer(resumed, []).run(True, ["run.iterations"])
    assert resumed.trained.average is not None and resumed.trained.average.steps == 10
    assert all(torch.equal(value, average[name]) for name, value in resumed.trained.average.state().items())


# --- rewards ---


def raising(media: Media) -> Scores:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    "answer",
    [
        raising,
        lambda media: Scores(torch.full((len(media),), math.nan), torch.zeros(len(media), dtype=torch.bool)),
    ],
    ids=["raises", "masked"],
)
def test_a_reward_of_weight_0_neither_masks_nor_ends_a_run(answer: Callable[[Media], Any], tmp_path: Path) -> None:
    """The weights are those of the run without it; its failures are counted."""
    alone = opened(tmp_path / "alone", judged(*APART), run__iterations=2)
    Trainer(alone, []).run(resume=False)
    watched = [NamedReward("watched", 0.0, Judge(answer=answer)), *judged(*APART)]
    both = opened(tmp_path / "both", watched, run__iterations=2)
    Trainer(both, []).run(resume=False)
    for name, value in both.updater.engine.parameters.items():
        assert torch.equal(value, alone.updater.engine.parameters[name])
    rows = metrics(tmp_path / "both")
    assert [row["reward/watched/invalid"] for row in rows] == [2 * LEAVES] * 2
    assert [row["reward/valid_fraction"] for row in rows] == [1, 1]


def test_a_recipe_whose_rewards_all_have_weight_0_is_refused() -> None:
    rewards = [{"reward": "guest_brightness", "weight": 0}]
    for use in (branchtree.plan, branchtree.train):
        with pytest.raises(RecipeError, match=r"rewards: every weight is 0"):
            use("guest", overrides={"rewards": rewards})


GOOD, FLAGS = torch.zeros(2), torch.ones(2, dtype=torch.bool)
WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, "it gave None"),
    "list": ([1.0, 2.0], "it gave a list"),
    "tuple": ((GOOD, FLAGS), "it gave a tuple"),
    "tensor": (GOOD, r"it gave a Tensor of shape \(2,\)"),
    "number": (1.0, "it gave a float"),
    "values list": (Scores([1.0, 2.0], FLAGS), "its 'values' is a list, not a tensor"),  # type: ignore[arg-type]
    "values numpy": (
        Scores(np.zeros(2, dtype=np.float32), FLAGS),  # type: ignore[arg-type]
        r"its 'values' is a ndarray of shape \(2,\), not a tensor",
    ),
    "values None": (Scores(None, FLAGS), "its 'values' is None, not a tensor"),  # type: ignore[arg-type]
    "values column": (Scores(GOOD[:, None], FLAGS), r"its 'values' has the shape \(2, 1\), not \(2,\)"),
    "values long": (Scores(torch.zeros(3), FLAGS), r"its 'values' has the shape \(3,\), not \(2,\)"),
    "values number": (Scores(torch.tensor(1.0), FLAGS), r"its 'values' has the shape \(\), not \(2,\)"),
    "values integers": (Scores(GOOD.long(), FLAGS), "its 'values' holds int64, not float32 numbers"),
    "values complex": (Scores(GOOD.to(torch.complex64), FLAGS), "its 'values' holds complex64, not float32 numbers"),
    "valid integers": (Scores(GOOD, FLAGS.int()), r"its 'valid' holds int32, not flags \(bool\)"),
    "valid list": (Scores(GOOD, [True, True]), "its 'valid' is a list, not a tensor"),  # type: ignore[arg-type]
    "valid None": (Scores(GOOD, None), "its 'valid' is None, not a tensor"),  # type: ignore[arg-type]
    "valid column": (Scores(GOOD, FLAGS[:, None]), r"its 'valid' has the shape \(2, 1\), not \(2,\)"),
    "raw list": (Scores(GOOD, FLAGS, raw=[1.0, 2.0]), "its 'raw' is a list, not a tensor"),  # type: ignore[arg-type]
    "raw column": (Scores(GOOD, FLAGS, raw=GOOD[:, None]), r"its 'raw' has the shape \(2, 1\), not \(2,\)"),
    "details list": (Scores(GOOD, FLAGS, details=[GOOD]), "its 'details' is a list, not tensors by name"),  # type: ignore[arg-type]
    "details None": (Scores(GOOD, FLAGS, details=None), "its 'details' is None, not tensors by name"),  # type: ignore[arg-type]
    "detail number": (Scores(GOOD, FLAGS, details={"a": 1.0}), "its 'details.a' is a float, not a tensor"),  # type: ignore[dict-item]
    "detail short": (
        Scores(GOOD, FLAGS, details={"a": GOOD[:1]}),
        r"its 'details.a' has the shape \(1,\), not \(2,\)",
    ),
    "reasons list": (Scores(GOOD, FLAGS, reasons=["a", "b"]), "its 'reasons' is a list, not texts by row"),  # type: ignore[arg-type]
    "reasons None": (Scores(GOOD, FLAGS, reasons=None), "its 'reasons' is None, not texts by row"),  # type: ignore[arg-type]
    "reason outside": (
        Scores(GOOD, FLAGS, reasons={2: "a"}),
        "its 'reasons' name the row 2, and rows are numbers from 0 to 1",
    ),
    "reason by name": (Scores(GOOD, FLAGS, reasons={"a": "b"}), "its 'reasons' name the row 'a'"),  # type: ignore[dict-item]
    "reason number": (Scores(GOOD, FLAGS, reasons={0: 5}), "its reason for row 0 is a int, not a text"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_whatever_else_a_reward_returns_gets_one_message(kind: str) -> None:
    answer, problem = WRONG[kind]
    media, conditions = Media(images=torch.zeros(2, 3, 4, 4)), [Condition("a")] * 2
    reward = NamedReward("mine", 1.0, Judge(answer=lambda _: answer))
    with pytest.raises(RewardError, match=f"reward 'mine' must give 2 values and valid flags .*, but {problem}"):
        ask(reward.label, reward.adapter, media, conditions)


def test_what_a_reward_may_return_is_brought_into_one_form() -> None:
    given = Scores(
        torch.tensor([1.0, math.inf], dtype=torch.float64, requires_grad=True),
        torch.ones(2, dtype=torch.bool),
        raw=torch.zeros(2, dtype=torch.bfloat16),
        details={"count": torch.tensor([3, 4])},
        reasons={np.int64(0): "it is fine"},  # type: ignore[dict-item]
    )
    reward = NamedReward("mine", 1.0, Judge(answer=lambda _: given))
    scores = ask(reward.label, reward.adapter, Media(images=torch.zeros(2, 3, 4, 4)), [Condition("a")] * 2)
    assert scores.valid.tolist() == [True, False]
    assert {scores.values.dtype, scores.raw.dtype, scores.details["count"].dtype} == {torch.float32}  # type: ignore[union-attr]
    assert not scores.values.requires_grad
    assert scores.reasons == {0: "it is fine", 1: "the value is not finite"}
