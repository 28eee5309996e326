"""One iteration of the method: plan, grow, score, assign credit, prune, differentiate, step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.diversity import compared_numbers
from branchtree.core.rollout import forwards
from branchtree.core.scores import Scores
from branchtree.core.tree import BranchTree, Topology
from branchtree.errors import RewardError
from branchtree.pictures.grid import Thumbnail, drawn, make_thumbnails
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Condition
from branchtree.training.continuation import compare_continuation
from branchtree.training.failures import Leaves, logged
from branchtree.training.objective import UpdateRecord
from branchtree.training.policy import Policy
from branchtree.training.probing import ProbeRecord, probing_forwards, score_probes
from branchtree.training.processes import GroupRecord
from branchtree.training.scoring import Scorer
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch
from branchtree.training.update import Gradient, partition


@dataclass(frozen=True)
class Batch:
    """The prompts of an iteration that this process works on."""

    ids: Sequence[int]  # (P,) their addresses for noise
    conditions: Sequence[Condition]  # (P,)
    topology: Topology  # of their trees, or of this process's share of each


@dataclass(frozen=True)
class Iteration:
    """What an iteration did, as far as this process knows it."""

    batch: Batch
    tree: BranchTree  # of this process's shares
    group: GroupRecord  # the whole trees, with their scores
    credit: Credit  # of the whole trees
    probes: ProbeRecord  # of this process's shares, where they are the baseline
    comparison: Mapping[str, float]  # of a coarse continuation with the whole grid, where it is due
    update: UpdateRecord
    timing: Stopwatch


def iterate(session: Session, iteration: int) -> Iteration:
    """Train on one iteration's prompts.

    Leaves are decoded and scored while other prompts' trees grow, and while the gradient pass works on prompts that are
    scored already. All processes call this together. Raises RewardError, on all of them, if a reward fails or too many
    samples have no valid score, and DataError if a condition's image or video is gone.
    """
    watch, processes = Stopwatch(session.device), session.processes
    batch = plan_batch(session, iteration)
    topology, reduction = batch.topology, session.sampler.reduction
    with watch.phase("encode"), processes.together():
        policy = session.policy.under(batch.conditions)
    policies = session.policies(policy, iteration)
    credits: list[Credit] = []
    gradient: Gradient | None = None

    growing = forwards(topology, session.limits.rollout.rows, session.recipe.batch.rollout_prompts)
    calls = processes.most(growing + probing_forwards(session, topology))
    try:
        with processes.together(), policy.in_step(calls) as in_step, session.scorer() as scorer:
            leaves = LeafScores(scorer, batch, policy, session.records_tree(iteration), watch)
            with watch.phase("rollout"):
                growth = session.grow(in_step, topology, batch.ids, iteration)
                for prompts, latents in growth:
                    leaves.put(prompts, latents)
                tree = growth.tree
            log_prob = tree.mean_log_prob(reduction)
            for prompts, scores in leaves.ready() if session.learns_early else ():
                with watch.phase("credit"):
                    credit = session.credit(topology, log_prob, scores, prompts, tree.dimensions, iteration)
                with watch.phase("update"):
                    gradient = gradient or session.updater.begin(tree, policies)
                    gradient.add(session.work(credit, topology, prompts, batch.ids, iteration))
                credits.append(credit)
            scores = leaves.finish()
            probes = score_probes(session, tree, batch.conditions, in_step, watch)
    except RewardError as error:
        session.log_failure(iteration, {"reason": logged(str(error))})
        raise
    failed = Leaves(topology, batch.ids, batch.conditions, session.first_prompt)
    session.failures.check(session.accelerator, scores, failed, partial(session.log_failure, iteration))

    with watch.phase("credit"):
        numbers = compared_numbers(tree.leaves) if session.recipe.alarm.enabled else None
        record = GroupRecord(topology, log_prob, scores, leaves.thumbnails(), probes.scores, numbers)
        group = session.team.gather(record)
        whole = group.topology
        rest = range(leaves.groups[len(credits)].start if credits else 0, topology.prompts)
        left = group.of(rest)
        gate = session.gate(whole, group.scores)
        last = session.credit(whole, group.log_prob, left, rest, tree.dimensions, iteration, group.probes, gate)
        last = session.batch_normalised(last, whole)
        credit = Credit.concatenate([*credits, last])
    # Before the weights change: the states come from these.
    comparison = compare_continuation(session, iteration, tree, scores, batch.conditions[0], policy.first(), watch)
    with watch.phase("update"):
        steps = partition(
            session.work(last, whole, rest, batch.ids, iteration),
            session.recipe.optim.steps_per_iteration,
            session.recipe.seed,
            iteration,
            batch.ids,
            session.first_prompt,
        )
        own = [session.team.own(each, whole, topology) for each in steps]
        update = session.updater.run(tree, own, policies, iteration, gradient)
    return Iteration(batch, tree, group, credit, probes, comparison, update, watch)


def plan_batch(session: Session, iteration: int) -> Batch:
    """Take the iteration's prompts and plan their trees."""
    plans = session.plans(iteration)
    return Batch(session.prompt_ids(iteration), session.conditions(iteration), session.team.grow(plans))


class LeafScores:
    """Has the leaves of an iteration's trees scored, and gives the scores as they are ready."""

    def __init__(self, scorer: Scorer, batch: Batch, policy: Policy, recorded: bool, watch: Stopwatch) -> None:
        """``policy`` is under the batch's prompts; ``recorded`` keeps the media of the first prompt's leaves."""
        self._scorer, self._batch, self._policy, self._watch = scorer, batch, policy, watch
        self._keep = batch.topology.span(0, batch.topology.steps) if recorded else range(0)
        self._kept: list[Future[list[Samples]]] = []
        self.groups: list[range] = []  # prompts that are scored together

    def put(self, prompts: range, latents: Tensor) -> None:
        """Hand over the clean latents (L, *latent) of consecutive prompts."""
        topology = self._batch.topology
        for group in scoring_groups(topology, prompts):
            leaves = topology.block(group, topology.steps)
            roots = topology.leaf_root[leaves.start : leaves.stop].tolist()
            own, latents = latents[: len(leaves)], latents[len(leaves) :]
            conditions = [self._batch.conditions[root] for root in roots]
            keep = self._keep if 0 in group else range(0)
            with self._watch.phase("reward"):
                self._kept.append(self._scorer.put(own, conditions, roots, keep, self._policy.encoded(roots)))
            self.groups.append(group)

    def ready(self) -> Iterator[tuple[range, dict[str, Scores]]]:
        """Yield prompts and their scores, by label, as soon as they are there; not the last prompts'."""
        for i, group in enumerate(self.groups[:-1]):
            with self._watch.phase("reward"):
                scores = self._scorer.scores_of(i)
            yield group, scores

    def finish(self) -> dict[str, Scores]:
        """Return all scores, by label, once they are there."""
        with self._watch.phase("reward"):
            scores = self._scorer.finish()
        self._watch.background |= self._scorer.seconds
        return scores

    def thumbnails(self) -> list[Thumbnail]:
        """Return a picture of each recorded leaf; none where samples of this kind are not drawn."""
        samples = [each for future in self._kept for each in future.result()]
        return make_thumbnails(drawn(samples, [self._batch.conditions[0]] * len(samples)))


def scoring_groups(topology: Topology, prompts: range) -> list[range]:
    """Return which prompts, of those that were grown together, are scored together.

    The very first prompt is scored alone, for its gradient pass hides the scoring of many more; not where that pass has
    fewer rows than the prompt has leaves.
    """
    plan = topology.plans[0]
    rows = sum(plan.widths[step] for step in range(plan.steps) if plan.trained[step])
    apart = prompts.start == 0 and len(prompts) > 1 and rows >= plan.leaves
    return [prompts[:1], prompts[1:]] if apart else [prompts]
