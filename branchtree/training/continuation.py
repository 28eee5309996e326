"""Whether a coarse continuation ranks samples as the whole grid would: compared now and then, and warned about.

Under `tree.continuation` or a solver, leaves are reached in other steps after the last stochastic one, and are rewarded
for what those make of them. Where that differs from what the whole grid makes of them, the policy learns to please the
short cut.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import forwards, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree, Topology, grow
from branchtree.plugins.values import Condition
from branchtree.training.policy import Policy
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch

log = logging.getLogger("branchtree")

GAP, CORRELATION = "continuation/gap/", "continuation/correlation/"

LARGEST_DRIFT = 1.0
"""The gap's change since the first comparison, in deviations of the rewards, above which a warning is given."""
LEAST_CORRELATION = 0.5
"""The correlation below which a warning is given: the short cut ranks a group in another order."""


def compare_continuation(
    session: Session,
    iteration: int,
    tree: BranchTree,
    scores: Mapping[str, Scores],
    condition: Condition,
    policy: Policy,
    watch: Stopwatch,
) -> dict[str, float]:
    """Score the first prompt's leaves again, as the whole grid and Euler's method reach them from the same states.

    ``condition`` and ``policy`` are that prompt's alone; of a tree that several processes share, the leaves are
    this process's. It is the main process's work, when its turn has come; the others keep in step.

    Returns:
        By reward, the mean difference whole - coarse in sample deviations of all the iteration's rewards, the two's
        correlation, and the rows that it took; nothing where it is not due.
    """
    due = session.accelerator.is_main_process and is_due(session, tree.topology.plans, iteration)
    max_rows = session.limits.rollout.rows
    calls = session.processes.most(comparing_forwards(tree.topology, max_rows) if due else 0)
    with policy.in_step(calls) as in_step:
        if not due:
            return {}
        with watch.phase("check"):
            return _compare(session, tree, scores, condition, in_step)


def _compare(
    session: Session, tree: BranchTree, scores: Mapping[str, Scores], condition: Condition, policy: Policy
) -> dict[str, float]:
    plan = tree.topology.plans[0]
    first = _first_after(plan)
    leaves = tree.topology.span(0, plan.steps)
    states = tree.states[first][: len(tree.topology.span(0, first))].to(session.device)
    each = {name: value.expand(len(states), *value.shape[1:]) for name, value in policy.conditioning.items()}
    whole = rollout(
        replace(policy, conditioning=each),
        replace(session.sampler, sigmas=session.sampler.sigmas[first:], solver="euler"),
        grow([_whole_grid(plan)] * len(states)),
        states,
        NoiseSource(session.recipe.seed, 0),  # nothing is drawn
        range(len(states)),
        max_rows=session.limits.rollout.rows,
    )
    with session.scorer(background=False) as scorer:
        prompts = [0] * len(leaves)
        scorer.put(whole.leaves, [condition] * len(leaves), prompts, encoded=policy.encoded(prompts))
        full = scorer.finish()
    figures = {"rows/continuation_check": float(whole.topology.rollout_rows * session.inputs.model.rows_per_prediction)}
    for label, score in full.items():
        figures |= _compared(label, score, scores[label], slice(leaves.start, leaves.stop))
    return figures


def comparing_forwards(topology: Topology, max_rows: int | None) -> int:
    """Return how many forwards a comparison makes."""
    plan = topology.plans[0]
    return forwards(grow([_whole_grid(plan)] * len(topology.span(0, _first_after(plan)))), max_rows)


def _whole_grid(plan: TreePlan) -> TreePlan:
    """Return the plan of one node that takes every step after a plan's last stochastic one."""
    steps = plan.steps - _first_after(plan)
    return TreePlan((1,) * steps, (False,) * steps, (False,) * steps)


def _first_after(plan: TreePlan) -> int:
    """Return the depth that a plan's last stochastic step leads to; 0 without one."""
    return plan.target[plan.last_stochastic] if plan.last_stochastic >= 0 else 0


def _compared(label: str, full: Scores, coarse: Scores, rows: slice) -> dict[str, float]:
    """Return both figures of one reward; none where fewer than two leaves can be compared or they do not differ."""
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
    """Warns once for each reward when the short cut differs from the whole grid.

    A constant gap does no harm, since a group's advantages do not see it. One that grows shows a policy that pleases
    the short cut.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._warned: set[str] = set()

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Read the first comparison of a run that is continued, from its lines of metrics."""
        for row in rows:
            for name in (name for name in row if name.startswith(GAP)):
                self._first.setdefault(name.removeprefix(GAP), row[name])

    def look(self, figures: Mapping[str, float]) -> None:
        """Compare these figures with those of the run's first comparison."""
        for name in [name for name in figures if name.startswith(GAP)]:
            label = name.removeprefix(GAP)
            drift = figures[name] - self._first.setdefault(label, figures[name])
            correlation = figures[f"{CORRELATION}{label}"]
            if label in self._warned or (abs(drift) <= LARGEST_DRIFT and correlation >= LEAST_CORRELATION):
                continue
            self._warned.add(label)
            log.warning(
                "the coarse continuation differs from the whole grid: by reward '%s' the gap has moved by %.2f of the "
                "rewards' deviations since the first look, and the two's correlation is %.2f; raise "
                "tree.continuation, or lower optim.lr",
                label,
                drift,
                correlation,
            )


def is_due(session: Session, plans: Sequence[TreePlan], iteration: int) -> bool:
    """Return whether this iteration compares: there is a short cut, and its turn has come."""
    tree = session.recipe.tree
    shortened = any(step > _first_after(plans[0]) for step in plans[0].skipped) or tree.solver != "euler"
    return shortened and iteration % tree.continuation_check == 0
