"""Does a coarse continuation rank samples as the whole grid would? Looked at now and then, and warned about.

Under `tree.continuation` or a solver, leaves are reached in other steps after the last stochastic one, and are rewarded
for what those make of them. Where that parts from what the whole grid makes of them, the policy learns to please the
short cut.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import forwards, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree, Topology, grow
from branchtree.plugins.protocols import Condition
from branchtree.training.lockstep import Phase
from branchtree.training.microbatch import fitted
from branchtree.training.policy import velocity_function
from branchtree.training.scorer import Scorer
from branchtree.training.scoring import InPlace, Workers
from branchtree.training.session import Session

log = logging.getLogger("branchtree")

GAP, CORRELATION = "continuation/gap/", "continuation/correlation/"

LARGEST_DRIFT = 1.0
"""Of the gap since the first look, in deviations of the rewards: above it the policy pleases the short cut alone."""
LEAST_CORRELATION = 0.5
"""Below it the short cut gives another order to a group."""


def compare_continuation(
    session: Session,
    tree: BranchTree,
    scores: Mapping[str, Scores],
    condition: Condition,
    conditioning: Mapping[str, Tensor],
    phase: Phase,
) -> dict[str, float]:
    """Score the first prompt's leaves again, as the whole grid and Euler's method reach them from the same states.

    ``condition`` and ``conditioning`` (1 row) are that prompt's; of a tree that several processes share, the leaves are
    this process's. Returns, by reward, the mean difference whole - coarse
    in sample deviations of all the iteration's rewards, the two's correlation, and the rows that it took.
    """
    plan, recipe = tree.topology.plans[0], session.recipe
    first = plan.last_stochastic + 1
    leaves = tree.topology.span(0, plan.steps)
    states = tree.states[first][: len(tree.topology.span(0, first))].to(session.device)
    rest = _rest(plan)
    sampler = replace(session.sampler, sigmas=session.sampler.sigmas[first:], solver="euler")
    each = {name: value.expand(len(states), *value.shape[1:]) for name, value in conditioning.items()}
    whole = rollout(
        fitted(
            phase.counted(velocity_function(session.inputs.model, each, session.accelerator.autocast)),
            session.limits.rollout,
        ),
        sampler,
        grow([rest] * len(states)),
        states,
        NoiseSource(recipe.seed, 0),  # nothing is drawn
        range(len(states)),
        max_rows=session.limits.rollout.rows,
    )
    count, workers = len(leaves), Workers(InPlace, InPlace)
    inputs, limits = session.inputs, session.limits
    with Scorer(inputs.model, inputs.rewards, workers, limits, limits.decode, session.device) as scorer:
        scorer.put(whole.leaves, [condition] * count, [0] * count)
        full = scorer.scores()
    figures = {"rows/continuation_check": float(whole.topology.rollout_rows * session.inputs.model.rows_per_prediction)}
    for label, score in full.items():
        figures |= _compared(label, score, scores[label], slice(leaves.start, leaves.stop))
    return figures


def comparing_forwards(topology: Topology, max_rows: int | None) -> int:
    """How many forwards ``compare_continuation`` makes."""
    plan = topology.plans[0]
    return forwards(grow([_rest(plan)] * len(topology.span(0, plan.last_stochastic + 1))), max_rows)


def _rest(plan: TreePlan) -> TreePlan:
    """The whole grid from a plan's last stochastic step on, of one node."""
    steps = plan.steps - plan.last_stochastic - 1
    return TreePlan((1,) * steps, (False,) * steps, (False,) * steps)


def _compared(label: str, full: Scores, coarse: Scores, rows: slice) -> dict[str, float]:
    """Both figures of one reward; none where fewer than two leaves can be compared or they do not differ."""
    both = full.valid & coarse.valid[rows]
    whole, short = full.values[both].double(), coarse.values[rows][both].double()
    if both.sum() < 2 or not bool(short.std() > 0) or not bool(whole.std() > 0):
        return {}
    spread = coarse.values[coarse.valid].double().std()
    return {
        f"{GAP}{label}": float((whole - short).mean() / spread),
        f"{CORRELATION}{label}": float(torch.corrcoef(torch.stack([whole, short]))[0, 1]),
    }


class ContinuationWatch:
    """Warns once for each reward when the short cut parts from the whole grid.

    A constant gap does no harm, since a group's advantages do not see it. One that grows shows a policy that pleases
    the short cut.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._warned: set[str] = set()

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take up the first look of a run that is continued, from its lines of metrics."""
        for row in rows:
            for name in (name for name in row if name.startswith(GAP)):
                self._first.setdefault(name.removeprefix(GAP), row[name])

    def look(self, figures: Mapping[str, float]) -> None:
        """Compare the figures of one look with those of the run's first."""
        for name in [name for name in figures if name.startswith(GAP)]:
            label = name.removeprefix(GAP)
            drift = figures[name] - self._first.setdefault(label, figures[name])
            correlation = figures[f"{CORRELATION}{label}"]
            if label in self._warned or (abs(drift) <= LARGEST_DRIFT and correlation >= LEAST_CORRELATION):
                continue
            self._warned.add(label)
            log.warning(
                "the coarse continuation parts from the whole grid: by reward '%s' the gap has moved by %.2f of the "
                "rewards' deviations since the first look, and the two's correlation is %.2f; raise "
                "tree.continuation, or lower optim.lr",
                label,
                drift,
                correlation,
            )


def is_due(session: Session, plans: Sequence[TreePlan], iteration: int) -> bool:
    """Whether this iteration compares: there is a short cut, and its turn has come."""
    tree = session.recipe.tree
    shortened = bool(plans[0].skipped) or tree.solver != "euler"
    return shortened and iteration % tree.continuation_check == 0
