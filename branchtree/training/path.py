"""The clipped policy gradient over a tree's edges: each edge's ratio of densities times its advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.families import Families, FamilyBatch, gather
from branchtree.core.loss import EdgeLoss, clipped_away, probability_ratio
from branchtree.core.rollout import Sampler, VelocityFunction
from branchtree.core.transfer import send
from branchtree.core.transitions import Transition
from branchtree.core.tree import BranchTree, Topology
from branchtree.recipe.schema import LossSection
from branchtree.training.objective import Earlier, Policies, UpdateRecord


@dataclass(frozen=True)
class PathObjective:
    """The loss of the edges that the schedule trains; one forward of a parent scores all its edges."""

    sampler: Sampler
    loss: LossSection
    device: torch.device
    edge_loss: EdgeLoss

    @property
    def looks_back(self) -> bool:
        """See Objective."""
        return self.loss.old_log_prob == "recomputed"

    def work(self, credit: Credit, topology: Topology, ids: Sequence[int], iteration: int) -> Families:
        """See Objective."""
        return credit.families(topology)

    def losses(
        self,
        tree: BranchTree,
        work: Families,
        policies: Policies,
        earlier: Earlier | None,
        record: UpdateRecord,
        first: bool,
    ) -> Tensor:
        """See Objective."""
        batch = gather(tree, work, self.device)
        transition = self._transition(policies.trained, batch)
        log_prob = transition.rows(batch.family).log_prob(batch.following, self.sampler.reduction)
        old = batch.log_prob if earlier is None else earlier.terms
        if first:
            # The weights are still those of the rollout, so the behaviour policy's density is this very number.
            old = log_prob.detach()
            record.mismatch.append((old - batch.log_prob).abs())
        ratio = probability_ratio(log_prob, old)
        losses = self.edge_loss(ratio, batch.advantage)
        if self.loss.weighting == "noise":
            weights = self.sampler.noise_weights(work.depth, batch.target, batch.active)
            losses = losses * send(weights[work.family], losses.device)
        record.rows += len(work)
        record.loss.append(losses.detach())
        record.depth.append(work.edge_depth)
        deviation = (ratio.detach() - 1).abs()
        record.deviation.append(deviation)
        if first:
            record.first_deviation.append(deviation)
        record.clipped.append(clipped_away(ratio.detach(), batch.advantage, self.loss.clip_range))
        if policies.reference is not None:
            divergence = self._divergence(policies.reference, batch, transition)
            record.reference_rows += len(work)
            record.kl.append(divergence.detach())
            losses = losses + self.loss.kl * divergence
        return losses

    def earlier(self, tree: BranchTree, work: Families, policies: Policies) -> Earlier:
        """Return log-densities (E,) under the trained policy as it is."""
        batch = gather(tree, work, self.device)
        transition = self._transition(policies.trained, batch).rows(batch.family)
        return Earlier(rows=None, terms=transition.log_prob(batch.following, self.sampler.reduction))

    def without_terms(self, tree: BranchTree, policies: Policies) -> Tensor:
        """See Objective."""
        latents = tree.states[0][:1].to(self.device)
        sigma, root = tree.sigmas[:1].to(latents.device), torch.zeros(1, dtype=torch.int64, device=latents.device)
        prediction = policies.trained(latents, sigma, root)
        if policies.reference is not None:
            with torch.no_grad():
                policies.reference(latents, sigma, root)
        return prediction.sum() * 0

    def _transition(self, velocity: VelocityFunction, batch: FamilyBatch) -> Transition:
        prediction = velocity(batch.latents, batch.sigma, send(batch.families.prompt, batch.latents.device))
        return self.sampler.transition(batch.latents, prediction, batch.families.depth, batch.active, batch.target)

    def _divergence(self, reference: VelocityFunction, batch: FamilyBatch, transition: Transition) -> Tensor:
        """Return the KL of each edge's transition to the start policy's, (E,)."""
        with torch.no_grad():
            start = self._transition(reference, batch)
        return transition.kl(start, self.sampler.reduction)[batch.family]
