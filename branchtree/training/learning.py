"""From scored leaves to an update: credit, families and the gradient pass, for all prompts or for some after others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.families import Families
from branchtree.core.rollout import Sampler
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree, Topology
from branchtree.training.gradient import Gradient, Policies, UpdateRecord
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch
from branchtree.training.update import partition


class Learning:
    """An iteration's update, whose gradient may begin with the prompts that are scored first."""

    def __init__(
        self, session: Session, policies: Policies, iteration: int, ids: Sequence[int], watch: Stopwatch
    ) -> None:
        self._session = session
        self._policies = policies
        self._iteration = iteration
        self._ids = ids
        self._watch = watch
        self._gradient: Gradient | None = None
        self._begun = 0  # prompts

    def begin(self, tree: BranchTree, prompts: range, scores: Mapping[str, Scores]) -> None:
        """Take up the next prompts of the tree; ``scores`` are of all leaves up to theirs.

        A prompt's credit is its own leaves' affair, so it is the same before the others are scored.
        """
        with self._watch.phase("credit"):
            topology = tree.topology.first(prompts.stop)
            log_prob = mean_log_prob(tree, self._session.sampler)
            known = [level[: topology.width(depth)] for depth, level in enumerate(log_prob)]
            credit = self._session.credit(topology, known, scores, self._iteration, dimensions(tree))
        with self._watch.phase("update"):
            if self._gradient is None:
                self._gradient = self._session.updater.begin(tree, self._policies)
            self._gradient.add(self._new(credit.families(topology)))
        self._begun = prompts.stop

    def finish(self, tree: BranchTree, whole: Topology, credit: Credit) -> UpdateRecord:
        """Take up what is left, and take the optimiser's steps. ``whole`` is the team's topology, with its credit."""
        session = self._session
        parts = partition(
            self._new(credit.families(whole)),
            session.recipe.optim.steps_per_iteration,
            session.recipe.seed,
            self._iteration,
            self._ids,
            session.share.start,
        )
        parts = [session.team.own(families, whole, tree.topology) for families in parts]
        return session.updater.run(tree, parts, self._policies, self._iteration, self._gradient)

    def _new(self, families: Families) -> Families:
        """Those of prompts that were not taken up yet."""
        return families if self._begun == 0 else families.select(torch.nonzero(families.prompt >= self._begun)[:, 0])


def dimensions(tree: BranchTree) -> int:
    """Of one sample's latents."""
    return tree.leaves[0].numel()


def mean_log_prob(tree: BranchTree, sampler: Sampler) -> list[Tensor]:
    """Edge densities averaged over latent dimensions."""
    divisor = dimensions(tree) if sampler.reduction == "sum" else 1
    return [level / divisor for level in tree.log_prob]
