"""Inner nodes under forward objectives: the clean samples predicted there, their draws, their loss, and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forward_reference as reference
import pytest
import torch
from forked import Python
from hypothesis import given, settings
from hypothesis import strategies as st
from picky_digits import read_picky
from strategies import Forest, batches, forests, make_plan, thorough
from test_forward import KINDS, LATENT, Toy, as_read, grown, objective
from test_forward_runs import opened
from tiny_flux import tiny_flux
from training_runs import arguments, largest_difference, metrics, small, weights

from branchtree import plan, train
from branchtree.core.credit import Credit, CreditRule, assign_credit
from branchtree.core.draws import ForwardRows
from branchtree.core.forward import clean_samples
from branchtree.core.gaussian import DanceSde
from branchtree.core.grid import time_grid
from branchtree.core.noise import IndependentSiblings, NoiseSource, Purpose
from branchtree.core.pruning import trainable_edges
from branchtree.core.rollout import Growth, Sampler
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree, Topology, grow
from branchtree.testing.probe import counted_rows
from branchtree.training.forward import ForwardObjective
from branchtree.training.iteration import iterate
from branchtree.training.metrics import gather_metrics
from branchtree.training.objective import OptimiserStep, Policies, UpdateRecord

SCRIPT = Path(__file__).with_name("picky_digits.py")
few = settings(thorough, max_examples=15)


# --- what is predicted ---


@pytest.mark.parametrize("together", [None, 1])
def test_a_tree_keeps_what_is_predicted_at_each_node(together: int | None) -> None:
    """A node that a joined step skips has what its descendant at the step's end has; a leaf has itself."""
    plans = [make_plan(6, {1: 2, 3: 3}), TreePlan((3, 1, 1, 1, 1, 1), (True, *[False] * 5), (True, *[False] * 5),
             frozenset({1, 2}))]  # fmt: skip
    topology, sampler = grow(plans), Sampler(DanceSde(0.5), IndependentSiblings(), time_grid(6, 3.0))
    initial = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))

    def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return (latents * (1 + prompt.view(-1, 1, 1)) + sigma.view(-1, 1, 1)).sin()

    growth = Growth(velocity, sampler, topology, initial, NoiseSource(0, 0), [3, 4], 2, together=together,
                    clean=clean_samples)  # fmt: skip
    for _ in growth:
        pass
    tree = growth.tree
    assert tree.clean[6].equal(tree.leaves)
    for depth in range(6):
        for node in range(topology.width(depth)):
            prompt, at, here = int(topology.root[depth][node]), depth, node
            while at in plans[prompt].skipped:
                here = topology.parent[at + 1].tolist().index(here)
                at += 1
            state, sigma = tree.states[at][here], float(sampler.sigmas[at])
            wanted = state - sigma * velocity(state[None], torch.tensor([sigma]), torch.tensor([prompt]))[0]
            torch.testing.assert_close(tree.clean[depth][node], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["velocity", "noise", "v"])
def test_a_clean_sample_follows_from_a_prediction(kind: Any) -> None:
    source = torch.Generator().manual_seed(0)
    states, guess = (torch.randn(4, *LATENT, generator=source, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    found = clean_samples(states, guess, sigma, kind)
    for i in range(4):
        wanted = reference.clean_sample(states[i], guess[i], float(sigma[i].float()), kind)
        torch.testing.assert_close(found[i], wanted, rtol=1e-6, atol=1e-6)


# --- which nodes, and their loss ---


@given(forests(), st.booleans())
@few
def test_nodes_below_a_trained_edge_with_an_advantage_are_trained(forest: Forest, regularised: bool) -> None:
    topology, scores = forest.topology, {"r": Scores(forest.reward_tensor.float(), forest.valid_tensor)}
    rule = CreditRule(regularised=regularised, draws=1, inner_nodes=True)
    credit = assign_credit(topology, forest.edge_log_prob, scores, {"r": 1.0}, rule, 0, 1)
    edges = trainable_edges(topology)
    for depth, mask in enumerate(credit.trained(topology)):
        for node, trained in enumerate(mask.tolist()):
            leaves = torch.nonzero(topology.ancestor[depth] == node)[:, 0].tolist()
            scored = any(forest.valid[leaf] for leaf in leaves)
            allowed = scored and (depth == topology.steps or bool(edges[depth][node]))
            assert trained == (allowed and (regularised or float(credit.advantages[depth][node]) != 0))


def credited(topology: Topology, seed: int) -> Credit:
    """Some nodes of every depth with advantages."""
    source = torch.Generator().manual_seed(seed)
    widths = [topology.width(depth) for depth in topology.depths]
    advantages = tuple(torch.randn(width, generator=source, dtype=torch.float64) for width in widths)
    keep = [torch.rand(width, generator=source) < min(1.0, 4 / width) for width in widths]
    keep[0] = torch.zeros_like(keep[0])
    return Credit({}, torch.ones(widths[-1], dtype=torch.bool), {}, advantages, tuple(keep), regularised=True)


def numbered(topology: Topology, prompt: int, depth: int, node: int) -> tuple[int, int]:
    """A node's own number and its family's, by counting: leaves, or families of the last split, come first."""
    plan = topology.plans[prompt]

    def index(depth: int, node: int) -> int:
        return (topology.root[depth][:node] == prompt).sum().item()  # type: ignore[return-value]

    def others(depth: int, node: int) -> int:
        return sum((topology.root[d] == prompt).sum().item() for d in range(depth)) + index(depth, node)  # type: ignore[misc]

    own = index(depth, node) if depth == topology.steps else plan.leaves + others(depth, node)
    split = max([step for step in plan.splits if step < depth], default=0)
    for at in range(depth, split, -1):
        node = int(topology.parent[at][node])
    last = max(plan.last_split, 0)
    family = index(split, node) if split == last else plan.widths[last] + others(split, node)
    return own, family


def read_rows(
    topology: Topology, tree: BranchTree, credit: Credit, ids: list[int], made: ForwardObjective
) -> list[reference.Row]:
    """The rows of all trained nodes, one after the other."""
    found, rule = [], made.draws
    for depth, mask in enumerate(credit.trained(topology)):
        for node in torch.nonzero(mask)[:, 0].tolist():
            prompt = int(topology.root[depth][node])
            own, family = numbered(topology, prompt, depth, node)
            source = {"leaf": own, "siblings": family, "group": 0}[rule.share]
            for draw in range(rule.count):
                noise = NoiseSource(rule.seed, 7).normal(Purpose.FORWARD, ids[prompt], draw, [source], LATENT)[0]
                one = ForwardRows(7, *(torch.tensor([value]) for value in (depth, node, prompt, ids[prompt], draw,
                                  source, 0)), torch.zeros(1), torch.zeros(1))  # fmt: skip
                sigma = float(rule.draw(one, tree.sigmas, LATENT)[0])
                group = (prompt, depth, family if rule.share == "siblings" else 0, draw)
                advantage = float(credit.advantages[depth][node].float())
                found.append(reference.Row(tree.clean[depth][node], noise.double(), sigma, prompt, advantage, group))
    return found


@given(
    plans=batches(),
    kind=st.sampled_from(KINDS),
    share=st.sampled_from(["leaf", "siblings", "group"]),
    seed=st.integers(0, 2**32 - 1),
)
@few
def test_their_loss_is_that_of_a_leaf_with_the_predicted_sample(
    plans: tuple[TreePlan, ...], kind: str, share: str, seed: int
) -> None:
    """Values and gradient against the reading in float64, in the second optimiser step, where all terms matter."""
    topology, ids = grow(plans), [11 * i + 5 for i in range(len(plans))]
    tree, credit, model, before = grown(topology, seed), credited(topology, seed), Toy(seed), Toy(seed + 1)
    source = torch.Generator().manual_seed(seed)
    clean = tuple(torch.randn(state.shape, generator=source, dtype=torch.float64) for state in tree.states)
    tree = BranchTree(topology, tree.sigmas, tree.states, tree.log_prob, clean)
    keys = {"kind": kind, "share_draws": share, "draws": 2, "error": "velocity", "error_weight": "none", "beta": 1.0,
            "advantage_range": 5.0, "clip_range": 0.3, "inner_nodes": True}  # fmt: skip
    made = objective(keys, tree.sigmas)
    work, rows = made.work(credit, topology, ids, 7), read_rows(topology, tree, credit, ids, made)
    assert len(work) == len(rows)
    if not rows:
        return
    with torch.no_grad():
        earlier = made.earlier(tree, work, Policies(before, None))
    step, record = OptimiserStep(tree, Policies(model, None), False), UpdateRecord()
    limit: Any = type("Limit", (), {"each": lambda self, count, call: [(None, call(slice(0, count)))]})()
    ready = made.prepare(step, work, earlier, record, limit)
    losses = made.losses(step, ready, earlier, record)
    losses.sum().backward()
    found = model.gradient()
    model.zero_grad()
    expected = reference.loss(rows, model.one, before.one, as_read(keys, "velocity"))
    sum(expected, start=torch.zeros(())).backward()
    assert losses.tolist() == pytest.approx([float(value.detach()) for value in expected], rel=1e-6, abs=1e-6)
    scale = max(float(model.gradient().abs().max()), 1.0)
    assert float((found - model.gradient()).abs().max()) <= 1e-6 * scale
    assert torch.cat(record.depth).equal(work.depth)
    if share == "leaf":
        assert len({(*pair,) for pair in zip(work.prompt.tolist(), work.source.tolist(), strict=True)}) == len(rows) / 2


# --- runs ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("flux"))


INNER: dict[str, Any] = {"loss__kind": "vgrpo", "loss__inner_nodes": True, "loss__draws": 2, "tree__sde": "splits"}


def test_their_rows_are_planned_and_counted(model: Path, tmp_path: Path) -> None:
    overrides = small(model, **INNER, loss__share_draws="siblings")
    planned, session = plan("quickstart", overrides), opened("quickstart", overrides, tmp_path / "run")
    with counted_rows(session.inputs.model.denoiser) as rows:
        row = gather_metrics(session, iterate(session, 0))
    # Of each prompt the 4 leaves, the 2 children of the first split and the 4 of the second, 2 draws each.
    assert row["rows/gradient"] == planned.gradient_rows == rows.gradient == 2 * (4 + 2 + 4) * 2
    assert row["rows/rollout"] == planned.rollout_rows == rows.rollout
    shares = {name: value for name, value in row.items() if name.startswith("loss_share/")}
    assert set(shares) == {f"loss_share/depth_{depth:02d}" for depth in (1, 3, 6)} and min(shares.values()) > 0
    without = plan("quickstart", {**overrides, "loss.inner_nodes": False})
    assert without.gradient_rows == 2 * 4 * 2
    assert planned.memory.states == 2 * without.memory.states


def test_processes_that_share_a_tree_learn_what_one_learns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"tree__branches": 3, "batch__prompts": 1, "scoring__max_invalid": 1.0, "batch__states": "host"}
    overrides = small(model, **INNER, **tree)
    read_picky(monkeypatch.setattr)
    train("quickstart", overrides, output=tmp_path / "one")
    words = ["train", "quickstart", *arguments(overrides), "batch.processes_per_prompt=2", "--output",
             str(tmp_path / "two"), "--no-report"]  # fmt: skip
    done = Python(str(SCRIPT), "2", *words)
    assert done.ended() == 0, done.out + done.err
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert sum(row["steps/taken"] for row in one) > 0
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in {"rows/gradient", "edges/trained", "loss", "forward/error", "grad_norm"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5
