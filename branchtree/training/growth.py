"""Growing the trees of an iteration and scoring their leaves, some prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from branchtree.noise import NoiseSource, Purpose, generator
from branchtree.protocols import Condition, Media, Scores
from branchtree.rollout import chunks, rollout
from branchtree.training.microbatch import fitted
from branchtree.training.policy import velocity_function
from branchtree.training.scoring import ScoringQueue, decode_and_put, make_executor
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch
from branchtree.tree import BranchTree


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
    with ScoringQueue(session.inputs.rewards, make_executor(recipe.scoring, session.device), session.limits) as queue:
        for span in chunks(len(ids), recipe.batch.rollout_prompts):
            part = slice(span.start, span.stop)
            with watch.phase("rollout"):
                encoded = {name: value[part] for name, value in conditioning.items()}
                tree = _rollout(session, iteration, ids[part], encoded)
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


def _rollout(session: Session, iteration: int, ids: Sequence[int], conditioning: dict[str, Tensor]) -> BranchTree:
    recipe = session.recipe
    model = session.inputs.model
    initial = [
        model.initial_noise(generator(recipe.tree.noise_seed, iteration, prompt_id, 0, 0, Purpose.INITIAL))
        for prompt_id in ids
    ]
    return rollout(
        fitted(velocity_function(model, conditioning, session.accelerator.autocast), session.limits.rollout),
        session.sampler,
        session.team.grow([session.inputs.schedule.plan(iteration, prompt_id) for prompt_id in ids]),
        torch.stack(initial).to(session.device),
        NoiseSource(recipe.seed, iteration),
        ids,
        max_rows=session.limits.rollout.rows,
        store=torch.device("cpu") if recipe.batch.states == "host" else None,
    )
