"""What several benchmarks do with a session: change its method, and take an iteration's parts one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from branchtree.core.credit import assign_credit
from branchtree.core.families import Families
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree
from branchtree.recipe.build import make_credit_rule, make_edge_rules, make_sampler, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import RunDirectory
from branchtree.training.inputs import Inputs, read_inputs
from branchtree.training.iteration import Batch, LeafScores, plan_batch
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.objective import UpdateRecord
from branchtree.training.path import PathObjective
from branchtree.training.policy import Policy
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch

QUIET = {"evaluation": None, "run.checkpoint_every": 10**6, "run.sample_every": 10**6, "run.tree_every": 10**6}


@contextmanager
def opened(recipe: Recipe, inputs: Inputs | None = None) -> Iterator[Session]:
    """A session of one process in a run directory that is gone afterwards."""
    with TemporaryDirectory() as folder:
        output = RunDirectory(Path(folder) / "run")
        accelerator = make_accelerator(recipe)
        output.claim(resume=False)
        yield open_session(inputs or read_inputs(recipe), output, accelerator)


def under(session: Session, recipe: Recipe) -> Session:
    """The same model, optimiser and update batches under another method, of which ``recipe`` tells."""
    sampler = make_sampler(recipe, session.inputs.model)
    objective = PathObjective(sampler, recipe.loss, session.device, make_edge_rules(recipe))
    return replace(
        session,
        inputs=replace(session.inputs, recipe=recipe, schedule=make_schedule(recipe)),
        policy=replace(session.policy, sampler=sampler),
        updater=replace(session.updater, objective=objective),
        credit_rule=make_credit_rule(recipe),
    )


@dataclass(frozen=True)
class Prompts:
    """The prompts of an iteration, and the policy under them."""

    batch: Batch
    policy: Policy

    @staticmethod
    def of(session: Session, iteration: int) -> Prompts:
        """The prompts that a run would take."""
        batch = plan_batch(session, iteration)
        return Prompts(batch, session.policy.under(batch.conditions))


def grown(session: Session, iteration: int, prompts: Prompts) -> tuple[BranchTree, dict[str, Scores]]:
    """The iteration's trees and the scores of their leaves."""
    with session.scorer() as scorer:
        leaves = LeafScores(scorer, prompts.batch, prompts.policy, False, Stopwatch(session.device))
        growth = session.grow(prompts.policy, prompts.batch.topology, prompts.batch.ids, iteration)
        for complete, latents in growth:
            leaves.put(complete, latents)
        return growth.tree, leaves.finish()


def credited(session: Session, iteration: int, tree: BranchTree, scores: dict[str, Scores]) -> Families:
    """The edges that the iteration trains, by parent."""
    log_prob = tree.mean_log_prob(session.sampler.reduction)
    weights = dict.fromkeys(scores, 1.0) | {reward.label: reward.weight for reward in session.inputs.rewards}
    credit = assign_credit(tree.topology, log_prob, scores, weights, session.credit_rule, iteration, tree.dimensions)
    return credit.families(tree.topology)


def updated(session: Session, iteration: int, tree: BranchTree, families: Families, prompts: Prompts) -> UpdateRecord:
    """One optimiser step on some families."""
    return session.updater.run(tree, [families], session.policies(prompts.policy, iteration), iteration)


def random_scores(tree: BranchTree, seed: int) -> dict[str, Scores]:
    """Standard normal rewards of all leaves."""
    leaves = tree.topology.width(tree.topology.steps)
    values = torch.randn(leaves, generator=torch.Generator().manual_seed(seed))
    return {"random": Scores(values, torch.ones(leaves, dtype=torch.bool))}


def edge_by_edge(families: Families) -> Families:
    """The same edges, each in a family of its own: siblings no longer share their parent's forward."""
    edges = families.family
    return replace(
        families,
        depth=families.depth[edges],
        parent=families.parent[edges],
        prompt=families.prompt[edges],
        family=torch.arange(families.edges),
    )
