"""A forward objective over a tree's nodes: each is noised again, and the policy's predictions there are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.draws import DrawRule, ForwardRows
from branchtree.core.families import rows_at
from branchtree.core.forward import (
    ForwardBatch,
    ForwardLoss,
    ForwardTerms,
    Noised,
    Prediction,
    clean_samples,
    mean_square,
    noise_samples,
)
from branchtree.core.rollout import CleanSamples, VelocityFunction
from branchtree.core.transfer import send
from branchtree.core.tree import BranchTree, Topology
from branchtree.recipe.schema import LossSection
from branchtree.training.limits import RowLimit
from branchtree.training.objective import Earlier, OptimiserStep, Policies, UpdateRecord, empty_loss


@dataclass(frozen=True)
class ForwardObjective:
    """The loss of the leaves that have an advantage, and of inner nodes on demand, a row for each of their draws."""

    loss: LossSection
    rule: ForwardLoss
    draws: DrawRule
    sigmas: Tensor  # (T + 1,) the rollout's grid
    prediction: Prediction  # what the model predicts
    device: torch.device

    @property
    def looks_back(self) -> bool:
        """See Objective."""
        return self.loss.old_policy == "rollout"

    @property
    def clean(self) -> CleanSamples | None:
        """See Objective."""
        return partial(clean_samples, kind=self.prediction) if self.loss.inner_nodes else None

    def work(self, credit: Credit, topology: Topology, ids: Sequence[int], iteration: int) -> ForwardRows:
        """See Objective."""
        return self.draws.rows(credit, topology, ids, iteration, self.rule.centred)

    def prepare(
        self, step: OptimiserStep, work: ForwardRows, earlier: Earlier | None, record: UpdateRecord, limit: RowLimit
    ) -> ForwardRows:
        """Return the rows with their groups' means, where the rule compares with them and they are not 0."""
        if not self.rule.centred or (step.first and self.looks_back) or not len(work):
            return work

        @torch.no_grad()
        def measure(rows: slice) -> Tensor:
            some = work.select(torch.arange(rows.start, rows.stop))
            known = None if earlier is None else earlier.of(rows, rows)
            return self.rule.value(self._batch(step, some, known, record)).cpu()

        record.rescored_rows += len(work)
        return work.with_group_value(torch.cat([value for _, value in limit.each(len(work), measure)]))

    def losses(self, step: OptimiserStep, work: ForwardRows, earlier: Earlier | None, record: UpdateRecord) -> Tensor:
        """See Objective."""
        batch = self._batch(step, work, earlier, record)
        terms = self.rule(batch)
        losses = terms.loss
        record.rows += len(work)
        record.loss.append(losses.detach())
        record.depth.append(work.depth)
        record.error.append(mean_square(batch.prediction.detach() - batch.noised.target))
        _record_terms(record, terms, step.first)
        if self.loss.kl_old:
            losses = losses + self.loss.kl_old * mean_square(batch.prediction - batch.old)
        if step.policies.reference is not None:
            pull, divergence = self._pull(step.policies.reference, work, batch)
            record.reference_rows += len(work.gated)
            record.kl.append(divergence.detach())
            losses = losses + self.loss.kl * pull
        return losses

    def _pull(self, reference: VelocityFunction, work: ForwardRows, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Return the mean square distance of each row's prediction to the start policy's, (F,), as far as its gate is
        open, and what it is where it is open.

        Rows for which the gate is closed are not sent to the start policy.
        """
        if work.gate is None:
            divergence = self._divergence(reference, work, batch.noised, batch.prediction)
            return divergence, divergence
        rows = work.gated
        index = send(rows, batch.prediction.device)
        divergence = self._divergence(reference, work.select(rows), batch.noised.rows(index), batch.prediction[index])
        gate = send(work.gate[rows], index.device)
        return divergence.new_zeros(len(work)).index_add(0, index, gate * divergence), divergence[gate > 0]

    def _divergence(self, reference: VelocityFunction, work: ForwardRows, noised: Noised, prediction: Tensor) -> Tensor:
        with torch.no_grad():
            start = self._predict(reference, work, noised)
        return mean_square(prediction - start)

    def earlier(self, tree: BranchTree, work: ForwardRows, policies: Policies) -> Earlier:
        """Return predictions (F, *latent) of the trained policy as it is."""
        prediction = self._predict(policies.trained, work, self._noised(tree, work))
        # As large as the leaves, and kept where those are.
        return Earlier(rows=prediction.to(tree.leaves.device), terms=torch.zeros(len(work)))

    def without_terms(self, tree: BranchTree, policies: Policies) -> Tensor:
        """See Objective."""
        return empty_loss(tree, policies, self.device)

    def _batch(
        self, step: OptimiserStep, work: ForwardRows, earlier: Earlier | None, record: UpdateRecord
    ) -> ForwardBatch:
        noised = self._noised(step.tree, work)
        prediction = self._predict(step.policies.trained, work, noised)
        if step.policies.old is not None:
            record.rescored_rows += len(work)
            with torch.no_grad():
                old = self._predict(step.policies.old, work, noised)
        elif step.first:
            old = prediction.detach()  # the weights are still those of the rollout
        elif earlier is not None and earlier.rows is not None:
            old = send(earlier.rows, prediction.device)
        else:
            raise ValueError("an optimiser step after the first needs the predictions from before it")
        advantage, group_value = (send(each, noised.states.device) for each in (work.advantage, work.group_value))
        return ForwardBatch(noised, prediction, old, advantage, group_value)

    def _noised(self, tree: BranchTree, work: ForwardRows) -> Noised:
        clean = rows_at(tree.clean or tree.states, work.depth, work.node, self.device)
        sigma, noise = (send(each, clean.device) for each in self.draws.draw(work, self.sigmas, clean.shape[1:]))
        return noise_samples(clean, noise, sigma, self.prediction)

    def _predict(self, policy: VelocityFunction, work: ForwardRows, noised: Noised) -> Tensor:
        return policy(noised.states, noised.sigma, send(work.prompt, noised.states.device))


def _record_terms(record: UpdateRecord, terms: ForwardTerms, first: bool) -> None:
    """Write down what a rule says of its rows beside the loss."""
    if terms.ratio is not None:
        deviation = (terms.ratio.detach() - 1).abs()
        record.deviation.append(deviation)
        if first:
            record.first_deviation.append(deviation)
    if terms.clipped is not None:
        record.clipped.append(terms.clipped)
    if terms.preference is not None:
        record.preference.append(terms.preference)
