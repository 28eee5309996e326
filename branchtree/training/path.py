"""The policy gradient over a tree's edges: each edge's ratio of new to old, times its advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.families import Families, FamilyBatch, gather
from branchtree.core.loss import EdgeRules, Edges, silenced
from branchtree.core.rollout import Sampler, VelocityFunction
from branchtree.core.transfer import send
from branchtree.core.transitions import Transition
from branchtree.core.tree import BranchTree, Topology
from branchtree.recipe.schema import LossSection
from branchtree.training.limits import RowLimit
from branchtree.training.objective import Earlier, OptimiserStep, Policies, UpdateRecord, empty_loss


@dataclass(frozen=True)
class PathObjective:
    """The loss of the edges that the schedule trains; one forward of a parent scores all its edges."""

    sampler: Sampler
    loss: LossSection
    device: torch.device
    rules: EdgeRules

    @property
    def looks_back(self) -> bool:
        """See Objective."""
        return self.rules.looks_back

    @property
    def clean(self) -> None:
        """See Objective: edges need states alone."""
        return None

    def work(self, credit: Credit, topology: Topology, ids: Sequence[int], iteration: int) -> Families:
        """See Objective."""
        return credit.families(topology)

    def prepare(
        self, step: OptimiserStep, work: Families, earlier: Earlier | None, record: UpdateRecord, limit: RowLimit
    ) -> Families:
        """Return the work as it is: an edge's loss depends on no other edge."""
        return work

    def losses(self, step: OptimiserStep, work: Families, earlier: Earlier | None, record: UpdateRecord) -> Tensor:
        """See Objective."""
        batch = gather(step.tree, work, self.device)
        prediction = self._predict(step.policies.trained, batch)
        transition = self._transition(batch, prediction)
        edges = self._edges(batch, transition, prediction.detach(), earlier, step.first)
        ratio = self.rules.ratio(edges)
        losses = self.rules.loss(ratio, edges)
        if step.first:
            record.mismatch.append((edges.old_log_prob - batch.log_prob).abs())
        record.clipped.append(silenced(losses, ratio, batch.advantage))
        losses = self._weighted(losses, batch)
        record.rows += len(work)
        record.loss.append(losses.detach())
        record.depth.append(work.edge_depth)
        deviation = (ratio.detach() - 1).abs()
        record.deviation.append(deviation)
        if step.first:
            record.first_deviation.append(deviation)
        if step.policies.reference is not None:
            pull, divergence = self._pull(step, step.policies.reference, work, batch, transition)
            record.reference_rows += len(work.gated)
            record.kl.append(divergence.detach())
            losses = losses + self.loss.kl * pull
        return losses

    def earlier(self, tree: BranchTree, work: Families, policies: Policies) -> Earlier:
        """Return log-densities (E,) and, where a rule compares transitions, predictions (F, ...)."""
        batch = gather(tree, work, self.device)
        prediction = self._predict(policies.trained, batch)
        transition = self._transition(batch, prediction).rows(batch.family)
        # Predictions are as large as the tree's states, and are kept where those are.
        kept = prediction.to(tree.states[0].device) if self.rules.compares_transitions else None
        return Earlier(rows=kept, terms=transition.log_prob(batch.following, self.sampler.reduction))

    def without_terms(self, tree: BranchTree, policies: Policies) -> Tensor:
        """See Objective."""
        return empty_loss(tree, policies, self.device)

    def _predict(self, velocity: VelocityFunction, batch: FamilyBatch) -> Tensor:
        return velocity(batch.latents, batch.sigma, send(batch.families.prompt, batch.latents.device))

    def _transition(self, batch: FamilyBatch, prediction: Tensor) -> Transition:
        return self.sampler.transition(batch.latents, prediction, batch.families.depth, batch.active, batch.target)

    def _edges(
        self, batch: FamilyBatch, transition: Transition, prediction: Tensor, earlier: Earlier | None, first: bool
    ) -> Edges:
        """Return what the rules compare; ``transition`` and ``prediction`` are of the families."""
        rows = transition.rows(batch.family)
        log_prob = rows.log_prob(batch.following, self.sampler.reduction)
        old_log_prob = batch.log_prob
        old_prediction: Tensor | None = None
        if first:  # the weights are still those of the rollout, so the old policy is this one
            old_log_prob, old_prediction = log_prob.detach(), prediction
        elif earlier is not None:
            old_log_prob, old_prediction = earlier.terms, earlier.rows
        old = None
        if self.rules.compares_transitions and old_prediction is not None:
            old = self._transition(batch, send(old_prediction, batch.latents.device)).rows(batch.family)
        return Edges(batch.advantage, batch.following, rows, log_prob, old_log_prob, old)

    def _weighted(self, losses: Tensor, batch: FamilyBatch) -> Tensor:
        """Multiply each edge's loss (E,) with the weight of its step."""
        if self.rules.weighting is not None:
            weights = self.rules.weighting(self.sampler, batch.families.depth, batch.target, batch.active)
            losses = losses * send(weights, losses.device)[batch.family]
        if self.loss.divide_by_dt:
            duration = self.sampler.sigmas[batch.families.depth] - self.sampler.sigmas[batch.target]
            losses = losses / send(duration, losses.device)[batch.family]
        return losses

    def _pull(
        self, step: OptimiserStep, reference: VelocityFunction, work: Families, batch: FamilyBatch, new: Transition
    ) -> tuple[Tensor, Tensor]:
        """Return each edge's KL to the start policy, (E,), as far as its gate is open, and what it is where it is open.

        ``new`` is of the families. Those below which the gate is closed are not sent to the start policy.
        """
        if work.gate is None:
            divergence = self._divergence(reference, batch, new)
            return divergence, divergence
        rows = work.gated
        edges = torch.nonzero(torch.isin(work.family, rows))[:, 0]
        some = gather(step.tree, work.select(rows), self.device)
        divergence = self._divergence(reference, some, new.rows(send(rows, self.device)))
        gate = send(work.gate[edges], self.device)
        pull = divergence.new_zeros(work.edges).index_add(0, send(edges, self.device), gate * divergence)
        return pull, divergence[gate > 0]

    def _divergence(self, reference: VelocityFunction, batch: FamilyBatch, transition: Transition) -> Tensor:
        """Return the KL of each edge's transition to the start policy's, (E,)."""
        with torch.no_grad():
            start = self._transition(batch, self._predict(reference, batch))
        return transition.kl(start, self.sampler.reduction)[batch.family]
