"""The gate of the KL term: who is ranked above what others say, whom the term acts on, and runs under it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import forward_reference
import pytest
import strategies
import test_forward
import test_path_objectives
import torch
from forked import Python
from hypothesis import given, settings
from hypothesis import strategies as st
from picky_digits import read_picky
from strategies import Forest, forests
from tiny_flux import tiny_flux
from torch import Tensor
from training_runs import arguments, largest_difference, metrics, small, weights

from branchtree import load_recipe, plan, train
from branchtree.core.credit import CreditRule, assign_credit
from branchtree.core.draws import DrawRule
from branchtree.core.gate import STEP, GateRule, disagreements, gate_of, gate_weights, win_rate
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import grow
from branchtree.errors import RecipeError
from branchtree.training.objective import OptimiserStep, Policies, UpdateRecord

SCRIPT = Path(__file__).with_name("picky_digits.py")
few = settings(strategies.thorough, max_examples=15)
LABELS = ("trained", "other", "first", "second")
WEIGHTS = {"trained": 2.0, "other": -0.5, "first": 0.0, "second": 0.0}


# --- readings ---


def wins(values: list[float | None], own: float) -> float:
    """The fraction of the other samples that one beats; a tie is half a win."""
    scored = [value for value in values if value is not None]
    if len(scored) == 1:
        return 0.5
    return (sum((value < own) + 0.5 * (value == own) for value in scored) - 0.5) / (len(scored) - 1)


def read_disagreements(scores: dict[str, list[float | None]]) -> list[float | None]:
    found: list[float | None] = []
    for i in range(len(scores["trained"])):
        one, other = scores["trained"][i], scores["other"][i]
        judges = [wins(scores[label], own) for label in ("first", "second") if (own := scores[label][i]) is not None]
        if one is None or other is None or not judges:
            found.append(None)
            continue
        reversed_other = [None if value is None else -value for value in scores["other"]]
        trained = (2.0 * wins(scores["trained"], one) + 0.5 * wins(reversed_other, -other)) / 2.5
        found.append(trained - sum(judges) / len(judges))
    return found


def read_gate(disagreement: list[float | None], share: float) -> list[float]:
    """Hand a budget out from the largest on; those that tie get the same."""
    known = [value for value in disagreement if value is not None]
    left, weight = share * len(known), dict.fromkeys(known, 0.0)
    for value in sorted({value for value in known if value > 0}, reverse=True):
        equal = known.count(value)
        weight[value] = min(left / equal, 1.0)
        left -= weight[value] * equal
    return [0.0 if value is None else weight[value] for value in disagreement]


@st.composite
def scored(draw: st.DrawFn) -> dict[str, list[float | None]]:
    """Four rewards of some samples, with ties and samples that could not be scored."""
    count = draw(st.integers(1, 12))
    value = st.one_of(st.none(), st.integers(-3, 3).map(float), st.floats(-9, 9, width=32))
    return {label: draw(st.lists(value, min_size=count, max_size=count)) for label in LABELS}


def as_scores(values: list[float | None]) -> Scores:
    """What could not be scored has a number that would spoil every rank."""
    spoilt = [math.nan if value is None else value for value in values]
    return Scores(torch.tensor(spoilt), torch.tensor([value is not None for value in values]))


@given(scored(), st.sampled_from([0.02, 0.1, 0.25, 0.5, 1.0]))
@strategies.thorough
def test_ranks_and_the_gate_equal_a_naive_reading(scores: dict[str, list[float | None]], share: float) -> None:
    rate = win_rate(as_scores(scores["first"])).tolist()
    for own, found in zip(scores["first"], rate, strict=True):
        assert math.isnan(found) if own is None else found == pytest.approx(wins(scores["first"], own), abs=1e-12)
    found = disagreements({label: as_scores(each) for label, each in scores.items()}, WEIGHTS)
    expected = read_disagreements(scores)
    for one, other in zip(found.tolist(), expected, strict=True):
        assert math.isnan(one) if other is None else one == pytest.approx(other, abs=1e-11)
    known = [None if math.isnan(value) else value for value in found.tolist()]  # ties are found to the bit
    assert gate_weights(found, share).tolist() == pytest.approx(read_gate(known, share), abs=1e-12)


def test_the_gate_opens_for_what_only_the_trained_reward_likes() -> None:
    scores = {"trained": as_scores([0.1, 0.9, 0.5, 0.4]), "judge": as_scores([0.3, 0.0, 0.2, 0.9])}
    found = disagreements(scores, {"trained": 1.0, "judge": 0.0})
    assert found.tolist() == pytest.approx([-2 / 3, 1, 1 / 3, -2 / 3])
    assert gate_weights(found, 0.25).tolist() == [0, 1, 0, 0]
    assert gate_weights(found, 0.375).tolist() == [0, 1, 0.5, 0]
    assert gate_weights(found, 1.0).tolist() == [0, 1, 1, 0]  # where the judge agrees or likes more, never


def test_the_share_follows_the_disagreement() -> None:
    rule = GateRule(0.1)
    state, shares = rule.start(), []
    for mean in (0.3, 0.4, 0.35, 0.5, 0.2, *[0.1 - 0.001 * i for i in range(40)]):
        state = rule.observe(state, torch.tensor([mean, -1.0, math.nan], dtype=torch.float64))
        shares.append(state["share"])
    up = 1 + STEP
    assert shares[:5] == pytest.approx([0.1, 0.1 * up, 0.1 * up, 0.1 * up**2, 0.1 * up**2 * (1 - STEP)])
    assert shares[-1] == pytest.approx(0.02)
    assert len(state["seen"]) == 20 and json.loads(json.dumps(state)) == state
    for _ in range(100):
        state = rule.observe(state, torch.tensor([state["seen"][-1] + 0.001]))
    assert state["share"] == pytest.approx(0.2)
    assert rule.observe(state, torch.tensor([-0.5, math.nan])) == state  # nobody was ranked above
    still = GateRule(0.3, adapts=False)
    assert still.observe({"share": 0.3, "seen": [0.1]}, torch.tensor([0.5]))["share"] == 0.3


# --- who is trained ---


@given(forest=forests(), forward=st.booleans(), whole=st.booleans(), regularised=st.booleans(), seed=st.integers(0, 99))
@few
def test_what_has_neither_an_advantage_nor_an_open_gate_is_not_trained(
    forest: Forest, forward: bool, whole: bool, regularised: bool, seed: int
) -> None:
    """An edge's gate is the mean of its leaves'; families and rows carry it along when they are cut."""
    topology = forest.topology
    source = torch.Generator().manual_seed(seed)
    leaves = torch.rand(topology.width(topology.steps), generator=source, dtype=torch.float64)
    leaves[torch.rand(len(leaves), generator=source) < 0.6] = 0
    gate = gate_of(topology, leaves)
    rule = CreditRule(regularised=regularised, draws=2 if forward else 0, whole_groups=forward and whole)
    scores = {"r": Scores(forest.reward_tensor.float(), forest.valid_tensor)}
    args = (topology, forest.edge_log_prob, scores, {"r": 1.0})
    credit = assign_credit(*args, rule, 0, 1, gate=gate)
    plain = assign_credit(*args, replace(rule, regularised=False), 0, 1)
    everything = assign_credit(*args, replace(rule, regularised=True), 0, 1)
    for depth, mask in enumerate(credit.trained(topology)):
        for node in range(topology.width(depth)):
            below = torch.nonzero(topology.ancestor[depth] == node)[:, 0]
            mean = float(leaves[below].mean())
            assert float(gate[depth][node]) == pytest.approx(mean, abs=1e-12)
            wanted = plain.trained(topology)[depth][node] or (everything.keep[depth][node] and mean > 0)
            assert bool(mask[node]) == bool(wanted)
    if forward:
        rows = DrawRule(0, 2).rows(credit, topology, range(topology.prompts), 0)
        assert rows.gate is not None
        torch.testing.assert_close(rows.gate, leaves[rows.node].float())
        half = rows.select(torch.arange(0, len(rows), 2))
        assert half.gate is not None and half.gate.equal(rows.gate[::2])
        return
    families = credit.families(topology)
    assert families.gate is not None
    expected = [float(gate[d][c]) for d, c in zip(families.edge_depth.tolist(), families.child.tolist(), strict=True)]
    assert families.gate.tolist() == pytest.approx(expected, abs=1e-6)
    some = families.select(torch.arange(0, len(families), 2))
    assert some.gate is not None and some.gate.equal(families.gate[families.family % 2 == 0])


# --- the loss ---


def gates(count: int, seed: int) -> Tensor:
    """Closed for some, open or ajar for others."""
    source = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(count, generator=source) - 0.8).clamp(0, 1)


@given(strategies.batches(), st.integers(0, 2), st.integers(0, 2**31), st.sampled_from([0.5, 50.0]))
@few
def test_the_loss_of_edges_equals_the_reading(plans: tuple[TreePlan, ...], kernel: int, seed: int, kl: float) -> None:
    """Values and gradient, edge by edge in double precision; rows whose gate is closed are not sent."""
    case = test_path_objectives.grown(plans, kernel, seed)
    if not case.families.edges:
        return
    gate = gates(case.families.edges, seed)
    case = replace(case, families=replace(case.families, gate=gate))
    made, start = test_path_objectives.objective(case, kl=kl, clip_range=1e-2), case.old.moved(seed + 2, 0.3)
    policy, record, sent = case.new.fresh(torch.float32), UpdateRecord(), []

    def reference(latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        sent.append(len(latents))
        return start(latents, sigma, prompt)

    earlier = made.earlier(case.tree, case.families, Policies(case.old, None))
    step = OptimiserStep(case.tree, Policies(policy, reference), False)
    losses = made.losses(step, case.families, earlier, record)
    losses.sum().backward()
    exact, frozen = case.new.fresh(torch.float64), start.fresh(torch.float64)
    expected, families, divergences = [], case.families, []
    for edge in range(families.edges):
        family = int(families.family[edge])
        depth = int(families.depth[family])
        x = case.tree.states[depth][int(families.parent[family])].double()
        here, there = (float(sigma) for sigma in case.sampler.sigmas[depth : depth + 2])
        level = torch.tensor([here], dtype=torch.float64)
        mine, std = case.step(x, exact(x[None], level, level)[0], here, there, True)
        other, _ = case.step(x, frozen(x[None], level, level)[0].detach(), here, there, True)
        divergence = ((mine - other) ** 2).mean() / (2 * std**2)
        divergences.append(float(divergence.detach()))
        edge_loss = test_path_objectives.read(case, exact, edge, made.loss).loss
        expected.append(edge_loss + kl * float(gate[edge]) * divergence)
    torch.stack(expected).sum().backward()
    wanted = torch.stack([each.detach() for each in expected])
    assert float((losses.detach() - wanted).abs().max()) <= 1e-6 * max(float(wanted.abs().max()), 1.0)
    scale = max(float(exact.gradient.abs().max()), float(wanted.abs().sum()), 1.0)
    assert float((policy.gradient - exact.gradient).abs().max()) <= 1e-6 * scale
    open_families = {int(families.family[edge]) for edge in range(families.edges) if gate[edge] > 0}
    assert sent == [record.reference_rows] == [max(len(open_families), 1)]
    seen = [value for value, weight in zip(divergences, gate.tolist(), strict=True) if weight > 0]
    assert torch.cat(record.kl).tolist() == pytest.approx(seen, rel=1e-4)


@given(strategies.batches(), st.sampled_from(test_forward.KINDS), st.integers(0, 2**31))
@few
def test_the_loss_of_leaves_equals_the_reading(plans: tuple[TreePlan, ...], kind: str, seed: int) -> None:
    topology, ids = grow(plans), list(range(len(plans)))
    tree, model, start = test_forward.grown(topology, seed), test_forward.Toy(seed), test_forward.Toy(seed + 1)
    credit = test_forward.credited(topology, seed)
    gate = gate_of(topology, gates(topology.width(topology.steps), seed).double())
    keys = {"kind": kind, "kl": 0.7, "draws": 2, "error": "velocity", "error_weight": "none", "beta": 1.0,
            "advantage_range": 5.0, "clip_range": 1e-2}  # fmt: skip
    made = test_forward.objective(keys, tree.sigmas)
    credit = replace(credit, gate=gate, regularised=made.rule.whole_groups)
    work, record = made.work(credit, topology, ids, 7), UpdateRecord()
    if not len(work):
        return
    losses = made.losses(OptimiserStep(tree, Policies(model, start)), work, None, record)
    losses.sum().backward()
    found = model.gradient()
    model.zero_grad()
    leaves = torch.nonzero(credit.trained(topology)[-1])[:, 0].tolist()
    rows = test_forward.read_rows(topology, tree, leaves, ids, credit, made)
    expected = forward_reference.loss(rows, model.one, model.one, test_forward.as_read(keys, "velocity"))
    for i, row in enumerate(rows):
        state, weight = forward_reference.noised(row, "velocity")[0], float(gate[-1][leaves[i // 2]].float())
        apart = model.one(state, row.sigma, row.prompt) - start.one(state, row.sigma, row.prompt).detach()
        expected[i] = expected[i] + 0.7 * weight * (apart**2).mean()
    sum(expected, start=torch.zeros(())).backward()
    assert losses.tolist() == pytest.approx([float(value.detach()) for value in expected], rel=1e-6, abs=1e-6)
    scale = max(float(model.gradient().abs().max()), 1.0)
    assert float((found - model.gradient()).abs().max()) <= 1e-6 * scale
    assert record.reference_rows == max(sum(float(gate[-1][leaves[i // 2]]) > 0 for i in range(len(rows))), 1)


# --- runs ---


JUDGED = [{"reward": "digits"}, {"reward": "digits", "label": "judge", "classifier": "heldout", "weight": 0}]
GATED: dict[str, Any] = {"loss__kl": 0.1, "loss__gate": {"share": 0.25}, "rewards": JUDGED, "optim__lr": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train("quickstart", small(model, **GATED), output=folder / "run")
    return folder / "run"


def test_a_run_says_for_whom_the_gate_opened(run: Path) -> None:
    rows = metrics(run)
    state = json.loads((run / "checkpoints/iteration_000002/state.json").read_text())["gate"]
    assert [state["share"], state["seen"]] == [rows[1]["gate/allowed"], [row["gate/disagreement"] for row in rows]]
    for row in rows:
        assert 0 < row["gate/share"] <= row["gate/allowed"] and row["steps/taken"] == 1
        assert 0 < row["rows/reference"] < row["rows/gradient"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[1]["kl"] > 1e-9
    direction = (rows[1]["gate/disagreement"] > rows[0]["gate/disagreement"]) * 2 - 1
    assert rows[1]["gate/allowed"] == pytest.approx(0.25 * (1 + STEP * direction))


def test_a_resumed_run_is_the_same_to_the_byte(run: Path, model: Path, tmp_path: Path) -> None:
    train("quickstart", small(model, **GATED, run__iterations=1), output=tmp_path / "run")
    train("quickstart", small(model, **GATED), output=tmp_path / "run", resume=True, allow=["run.iterations"])
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["path", "nft"])
def test_two_processes_open_it_for_whom_one_does(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of their own under edges, shared trees under leaves; some leaves cannot be scored."""
    shared = {"loss__kind": "nft", "loss__draws": 2, "batch__prompts": 1} if kind == "nft" else {}
    overrides = small(model, **GATED, **shared, scoring__max_invalid=1.0)
    read_picky(monkeypatch.setattr)
    train("quickstart", overrides, output=tmp_path / "one")
    members = ["batch.processes_per_prompt=2"] if kind == "nft" else []
    words = ["train", "quickstart", *arguments(overrides), *members, "--output", str(tmp_path / "two"), "--no-report"]
    done = Python(str(SCRIPT), "2", *words)
    assert done.ended() == 0, done.out + done.err
    for first, second in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        names = [name for name in first if name.startswith(("gate/", "edges/", "loss", "kl", "grad_norm"))]
        assert {name: second[name] for name in names} == pytest.approx(
            {name: first[name] for name in names}, rel=1e-3, abs=1e-5
        )
        assert second["rows/reference"] >= first["rows/reference"]  # an edge's family may have several owners
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": JUDGED}, r"loss\.gate: limits the KL term, which has no weight; set loss\.kl"),
        ({"loss.kl": 0.1}, r"loss\.gate: .* every reward has a weight; add one of weight 0"),
    ],
)
def test_a_gate_without_a_term_or_a_judge_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan("quickstart", {"loss.gate.share": 0.2, **changes})


def test_the_gate_is_off_unless_it_is_asked_for() -> None:
    assert load_recipe("quickstart").loss.gate is None
    gate = load_recipe("quickstart", {"loss.gate.share": 0.2}).loss.gate
    assert gate is not None and (gate.share, gate.adapts) == (0.2, True)
