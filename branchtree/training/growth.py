"""Growing the trees of an iteration and scoring their leaves, some prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.noise import NoiseSource, Purpose, generator
from branchtree.protocols import Condition, Media, Scores
from branchtree.rollout import chunks, forwards, rollout
from branchtree.training.lockstep import Phase
from branchtree.training.microbatch import fitted
from branchtree.training.policy import velocity_function
from branchtree.training.scoring import ScoringQueue, decode_and_put, make_executor
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch
from branchtree.tree import BranchTree, Topology


def grow_and_score(
    session: Session,
    iteration: int,
    ids: Sequence[int],
    conditions: Sequence[Condition],
    conditioning: dict[str, Tensor],
    watch: Stopwatch,
    recorded: bool,
) -> tuple[BranchTree, dict[str, Scores], list[Media]]:
    """The tree of all prompts, its leaves' scores, and, if it is recorded, the media of the first prompt's leaves.

    Of prompts whose trees several processes share it is this process's part.
    While some prompts' leaves are scored, the trees of the next ones grow.
    """
    recipe = session.recipe
    trees: list[BranchTree] = []
    media: list[Media] = []
    spans = chunks(len(ids), recipe.batch.rollout_prompts)
    topologies = [
        session.team.grow([session.inputs.schedule.plan(iteration, ids[place]) for place in span]) for span in spans
    ]
    phase = session.lockstep.phase(sum(forwards(topology, session.limits.rollout.rows) for topology in topologies))
    with (
        _joining(session, phase, conditioning),
        ScoringQueue(session.inputs.rewards, make_executor(recipe.scoring, session.device), session.limits) as queue,
    ):
        for span, topology in zip(spans, topologies, strict=True):
            part = slice(span.start, span.stop)
            with watch.phase("rollout"):
                encoded = {name: value[part] for name, value in conditioning.items()}
                tree = _rollout(session, iteration, topology, ids[part], encoded, phase)
            prompts = [span[place] for place in tree.topology.leaf_root.tolist()]
            keep = len(tree.topology.span(0, tree.topology.steps)) if recorded and not trees else 0
            asked = [conditions[prompt] for prompt in prompts]
            media += decode_and_put(
                queue, session.inputs.model, tree.leaves, asked, prompts, session.limits.decode, watch, keep
            )
            trees.append(tree)
        with watch.phase("decode"):
            session.inputs.model.release_frozen()
        with watch.phase("reward"):
            scores = queue.results()
    watch.background["reward_work"] = queue.seconds
    return BranchTree.joined(trees), scores, media


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
        torch.stack(initial).to(session.device),
        NoiseSource(recipe.seed, iteration),
        ids,
        max_rows=session.limits.rollout.rows,
        store=torch.device("cpu") if recipe.batch.states == "host" else None,
    )
