"""The training loop: rollout, score, credit, update; one readable page and its helpers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from branchtree.credit import Credit
from branchtree.errors import (
    BranchTreeError,
    DataError,
    OutputError,
    RecipeError,
    RewardError,
)
from branchtree.preflight import require_memory
from branchtree.protocols import Callback, Condition, Scores
from branchtree.recipe.schema import Recipe
from branchtree.training.continuation import ContinuationWatch, compare_continuation, comparing_forwards, is_due
from branchtree.training.disk import writing
from branchtree.training.growth import grow_and_score, join_forwards
from branchtree.training.interrupt import StopRequest
from branchtree.training.keeper import CheckpointKeeper
from branchtree.training.learning import Learning, dimensions, mean_log_prob
from branchtree.training.metrics import ShareRecord, iteration_metrics, merged
from branchtree.training.reporter import Reporter, TrainResult
from branchtree.training.restore import agreed_checkpoint
from branchtree.training.rundir import METRICS, RunDirectory
from branchtree.training.samples import thumbnails, write_tree
from branchtree.training.session import Session, make_accelerator, open_session, read_inputs
from branchtree.training.teams import GroupRecord
from branchtree.training.timing import Stopwatch
from branchtree.tree import BranchTree, Topology, grow


def train_recipe(
    recipe: Recipe,
    output: Path,
    resume: bool,
    callbacks: Sequence[Callback] = (),
    allow: Sequence[str] = (),
    force: bool = False,
) -> TrainResult:
    """Run a resolved recipe in a directory; see ``branchtree.train``."""
    if allow and not resume:
        raise RecipeError("--allow names keys that may change on --resume; leave it out, or add --resume")
    require_memory(recipe, force)
    directory = RunDirectory(output)
    inputs = read_inputs(recipe)
    accelerator = make_accelerator(recipe, directory)
    with directory.claimed(resume) if accelerator.is_main_process else nullcontext():
        try:
            checkpoint = agreed_checkpoint(accelerator, directory.checkpoints, recipe, allow) if resume else None
            session = open_session(inputs, directory, accelerator, checkpoint)
            return Trainer(session, [*inputs.callbacks, *callbacks]).run(resume, allow)
        except (BranchTreeError, KeyboardInterrupt):
            if accelerator.is_main_process:
                directory.discard_untrained()
            raise


class Trainer:
    """Runs the iterations of one session."""

    def __init__(self, session: Session, callbacks: Sequence[Callback]) -> None:
        self._session = session
        self._main = session.accelerator.is_main_process
        self._reporter = Reporter(session, callbacks)
        self._continuation = ContinuationWatch()
        self._keeper = CheckpointKeeper(session)

    def run(self, resume: bool, allow: Sequence[str] = ()) -> TrainResult:
        """Train to the end, or until asked to stop; then write ``final/``.

        ``allow`` names keys of the recipe that may have changed since the checkpoint. Raises OutputError, which says
        what is kept, if something cannot be written.
        """
        try:
            with self._keeper:
                return self._run(resume, allow)
        except OutputError as error:
            raise OutputError(f"{error}. {self._keeper.kept()}") from error

    def _run(self, resume: bool, allow: Sequence[str]) -> TrainResult:
        session, recipe = self._session, self._session.recipe
        started = time.perf_counter()
        done = self._start(resume, allow)
        with StopRequest() as stop:
            for iteration in range(done, recipe.run.iterations):
                self._keeper.check()
                self._iteration_or_checkpoint(iteration)
                done = iteration + 1
                stopping = self._any_process(stop.requested)
                self._after(done, stopping)
                if stopping:
                    break
        self._keeper.wait()
        finished = done == recipe.run.iterations
        if finished:
            self._reporter.finish(done, time.perf_counter() - started)
        session.accelerator.end_training()
        return self._reporter.result(done, finished)

    def _iteration_or_checkpoint(self, iteration: int) -> None:
        """An iteration; if its rewards or data fail, which is before its update, what was learnt until then is kept."""
        try:
            self._iteration(iteration)
        except (RewardError, DataError):
            if iteration > 0:
                self._keeper.save(iteration)
            raise

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process: a signal may reach them between different iterations."""
        accelerator = self._session.accelerator
        return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum"))

    def _start(self, resume: bool, allow: Sequence[str]) -> int:
        """Take up the session's checkpoint or begin; returns the iterations done before."""
        session, recipe = self._session, self._session.recipe
        done = self._keeper.restore(allow) if resume else 0
        if resume:
            session.limits.recall(session.output)
        if self._main:
            session.output.rewind(done)
            session.output.write_recipe(recipe)
            self._continuation.recall(session.output.rows(METRICS))
        session.failures.recall(session.accelerator, session.output)
        self._reporter.start(done)
        session.cache.prepare(self._upcoming(done))
        if done == 0:
            self._reporter.evaluate(0)
            self._reporter.sample(0)
        return done

    def _upcoming(self, done: int) -> Iterator[Condition]:
        """Each condition that this process will train on, once."""
        session, recipe = self._session, self._session.recipe
        order, conditions, seen = session.order, session.inputs.conditions, set[int]()
        for iteration in range(done, recipe.run.iterations):
            for prompt_id in order.batch(iteration, recipe.batch.prompts)[session.share]:
                index = order.index(prompt_id)
                if index not in seen:
                    seen.add(index)
                    yield conditions[index]
            if len(seen) == len(conditions):
                return

    def _iteration(self, iteration: int) -> None:
        session, recipe = self._session, self._session.recipe
        watch = Stopwatch(session.device)
        ids = session.order.batch(iteration, recipe.batch.prompts)[session.share]
        conditions = [session.inputs.conditions[session.order.index(prompt_id)] for prompt_id in ids]
        with watch.phase("encode"):
            conditioning = self._encoded(conditions)
        recorded = session.team.place == 0 and iteration % recipe.run.tree_every == 0
        learning = Learning(session, session.policies(conditioning, iteration), iteration, ids, watch)
        scored = learning.begin if session.learns_early else None
        tree, scores, media = session.lockstep.together(
            lambda: grow_and_score(session, iteration, ids, conditions, conditioning, watch, recorded, scored)
        )
        session.failures.check(session.accelerator, scores)
        with watch.phase("credit"):
            log_prob = mean_log_prob(tree, session.sampler)
            group = session.team.whole(GroupRecord(tree.topology, log_prob, scores, thumbnails(media)))
            credit = session.credit(group.topology, group.log_prob, group.scores, iteration, dimensions(tree))
        # Before the weights change: the states come from these.
        check = self._continuation_check(iteration, tree, scores, conditions[0], conditioning, watch)
        with watch.phase("update"):
            update = learning.finish(tree, group.topology, credit)
        session.limits.settle(session.accelerator, session.output)
        rows = tree.topology.rollout_rows
        share = ShareRecord(tree.topology.plans, tuple(group.log_prob), dimensions(tree), group.scores, rows, update)
        metrics = {**self._metrics(share, group.topology, credit, iteration), **check}
        if self._main and recorded:
            trees, prompt = session.output.root / "trees", conditions[0].prompt
            with writing(trees):
                write_tree(trees, iteration, prompt, group.topology, group.scores, credit, group.thumbnails)
        self._reporter.iteration(iteration, metrics, watch)

    def _encoded(self, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """The encoded conditions. Raises DataError, on every process, if one's image or video is gone."""
        from accelerate.utils import gather_object

        session = self._session
        encoded, problem = dict[str, Tensor](), None
        try:
            encoded = dict(session.cache.get(conditions, session.device))
        except DataError as error:
            problem = str(error)
        problems = [told for told in gather_object([problem]) if told is not None]
        if problems:
            raise DataError(problems[0])
        return encoded

    def _continuation_check(
        self,
        iteration: int,
        tree: BranchTree,
        scores: Mapping[str, Scores],
        condition: Condition,
        conditioning: Mapping[str, Tensor],
        watch: Stopwatch,
    ) -> dict[str, float]:
        """How far the continuation's rewards are from the whole grid's, of the iteration's first prompt."""
        session = self._session
        due = self._main and is_due(session, tree.topology.plans, iteration)
        phase = session.lockstep.phase(comparing_forwards(tree.topology, session.limits.rollout.rows) if due else 0)
        figures: dict[str, float] = {}
        first = {name: value[:1] for name, value in conditioning.items()}
        if due:
            with watch.phase("check"):
                figures = compare_continuation(session, tree, scores, condition, first, phase)
            self._continuation.look(figures)
        join_forwards(session, phase, first)
        return figures

    def _metrics(self, share: ShareRecord, topology: Topology, credit: Credit, iteration: int) -> dict[str, float]:
        """The iteration's figures over all processes, whose shares come in the order of their prompts."""
        from accelerate.utils import gather_object

        session = self._session
        whole = merged(gather_object([share]), session.team.members)
        if session.accelerator.num_processes > 1:
            topology = grow(whole.plans)
            credit = session.credit(topology, whole.log_prob, whole.scores, iteration, whole.dimensions)
        factor = session.inputs.model.rows_per_prediction
        metrics = iteration_metrics(topology, whole, credit, factor)
        return {**metrics, "lr": float(session.updater.optimizer.param_groups[0]["lr"])}

    def _after(self, done: int, stopping: bool) -> None:
        """What happens between iterations: evaluation, samples, checkpoints."""
        session, recipe = self._session, self._session.recipe
        last = done == recipe.run.iterations
        every = recipe.evaluation.every if recipe.evaluation else None
        evaluating = last or bool(every and done % every == 0)
        sampling = last or done % recipe.run.sample_every == 0
        if evaluating or sampling:  # putting the average in and out copies every trained weight
            with session.trained.as_exported():
                if evaluating:
                    self._reporter.evaluate(done)
                if sampling:
                    self._reporter.sample(done)
        if last or stopping or done % recipe.run.checkpoint_every == 0:
            self._keeper.save(done)
        session.accelerator.wait_for_everyone()
