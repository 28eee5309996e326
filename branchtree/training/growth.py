"""Growing the trees of an iteration and scoring their leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.rollout import Finished, forwards, rollout
from branchtree.core.scores import Scores
from branchtree.core.transfer import send
from branchtree.core.tree import BranchTree, Topology
from branchtree.errors import RewardError
from branchtree.plugins.protocols import Condition, Media
from branchtree.training.lockstep import Phase
from branchtree.training.microbatch import fitted
from branchtree.training.policy import velocity_function
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch

Scored = Callable[[BranchTree, range, dict[str, Scores]], None]
"""Is told of the tree of all prompts, of the next prompts whose leaves are scored, and of all scores up to theirs."""


def grow_and_score(
    session: Session,
    iteration: int,
    ids: Sequence[int],
    conditions: Sequence[Condition],
    conditioning: dict[str, Tensor],
    watch: Stopwatch,
    recorded: bool = False,
    scored: Scored | None = None,
) -> tuple[BranchTree, dict[str, Scores], list[Media]]:
    """The tree of all prompts, its leaves' scores, and, if it is recorded, the media of the first prompt's leaves.

    Of prompts whose trees several processes share it is this process's part. While some prompts' leaves are decoded and
    scored, the others' trees grow on. Then ``scored`` is told of the prompts in turn, but not of the last, while
    later ones are scored.
    """
    topology = session.team.grow([session.inputs.schedule.plan(iteration, prompt_id) for prompt_id in ids])
    together, limit = session.recipe.batch.rollout_prompts, session.limits.rollout
    phase = session.lockstep.phase(forwards(topology, limit.rows, together))
    given: list[tuple[range, Future[list[Media]]]] = []
    with _joining(session, phase, conditioning), session.scorer() as scorer:

        def decode_and_score(group: range, latents: Tensor) -> None:
            for prompts in rounds(topology, group):
                leaves = topology.block(prompts, topology.steps)
                roots = topology.leaf_root[leaves.start : leaves.stop].tolist()
                own, latents = latents[: len(leaves)], latents[len(leaves) :]
                keep = topology.span(0, topology.steps) if recorded and 0 in prompts else range(0)
                with watch.phase("reward"):
                    given.append((prompts, scorer.put(own, [conditions[root] for root in roots], roots, keep)))

        with watch.phase("rollout"):
            tree = _rollout(session, iteration, topology, ids, conditioning, phase, decode_and_score)
        if scored is not None:
            for puts, (prompts, _) in enumerate(given[:-1], start=1):
                with watch.phase("reward"):
                    scores = scorer.scores(puts)
                scored(tree, prompts, scores)
        with watch.phase("reward"):
            scores = scorer.scores()
    watch.background |= scorer.seconds
    return tree, scores, [media for _, kept in given for media in kept.result()]


def rounds(topology: Topology, group: range) -> list[range]:
    """Prompts whose leaves are scored together, of those that were grown together.

    The very first prompt is scored alone, for its gradient pass hides the scoring of many more; not where that pass has
    fewer rows than the prompt has leaves.
    """
    plan = topology.plans[0]
    rows = sum(plan.widths[step] for step in range(plan.steps) if plan.trained[step])
    apart = group.start == 0 and len(group) > 1 and rows >= plan.leaves
    return [group[:1], group[1:]] if apart else [group]


@contextmanager
def _joining(session: Session, phase: Phase, conditioning: dict[str, Tensor]) -> Iterator[None]:
    """A context that ends with the forwards of other processes, even where a reward failed in it."""
    try:
        yield
    except RewardError:
        join_forwards(session, phase, conditioning)
        raise
    join_forwards(session, phase, conditioning)


def join_forwards(session: Session, phase: Phase, conditioning: dict[str, Tensor]) -> None:
    """Make the forwards of a phase that only other processes need."""
    if phase.done:
        return
    model = session.inputs.model
    row = model.initial_noise(generator(0, 0, 0, 0, 0, Purpose.INITIAL))[None].to(session.device)
    phase.join(velocity_function(model, conditioning, session.accelerator.autocast), row)


def _rollout(
    session: Session,
    iteration: int,
    topology: Topology,
    ids: Sequence[int],
    conditioning: dict[str, Tensor],
    phase: Phase,
    finished: Finished,
) -> BranchTree:
    recipe = session.recipe
    model = session.inputs.model
    initial = [
        model.initial_noise(generator(recipe.tree.noise_seed, iteration, prompt_id, 0, 0, Purpose.INITIAL))
        for prompt_id in ids
    ]
    velocity = velocity_function(model, conditioning, session.accelerator.autocast)
    return rollout(
        fitted(phase.counted(velocity), session.limits.rollout),
        session.sampler,
        topology,
        send(torch.stack(initial), session.device),
        NoiseSource(recipe.seed, iteration),
        ids,
        max_rows=session.limits.rollout.rows,
        store=torch.device("cpu") if recipe.batch.states == "host" else None,
        together=recipe.batch.rollout_prompts,
        finished=finished,
    )
