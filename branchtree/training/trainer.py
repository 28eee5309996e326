"""The training loop around ``iterate``: resuming, checkpoints, what is shown, and what a failure leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from branchtree.errors import (
    BranchTreeError,
    CallbackError,
    DataError,
    DivergenceError,
    ModelError,
    OutputError,
    RecipeError,
    RewardError,
    TrackerError,
)
from branchtree.pictures.grid import write_tree
from branchtree.planning.preflight import require_memory
from branchtree.plugins.base import Callback
from branchtree.plugins.values import Condition
from branchtree.recipe.schema import Recipe
from branchtree.run.checkpoint import iteration_of
from branchtree.run.directory import METRICS, TREES, RunDirectory
from branchtree.training.alarm import spreads_by_plan
from branchtree.training.continuation import ContinuationWatch
from branchtree.training.faults import REMEDY
from branchtree.training.inputs import read_inputs
from branchtree.training.interrupt import StopRequest
from branchtree.training.iteration import iterate
from branchtree.training.keeper import CheckpointKeeper
from branchtree.training.loading import agreed_checkpoint, make_accelerator, open_session
from branchtree.training.metrics import gather_record, metrics_of
from branchtree.training.policy import Policy
from branchtree.training.reporter import Reporter, TrainResult
from branchtree.training.session import Session
from branchtree.training.soundness import find_divergence, find_fault
from branchtree.training.tracking import Trackers, running_trackers
from branchtree.training.trained import Progress

log = logging.getLogger("branchtree")

REMEDIES: dict[type[BranchTreeError], str] = {
    OutputError: "once there can be written again",
    CallbackError: "once the callback is corrected",
    TrackerError: "once the tracker works again",
}
"""What must come before a run goes on that ended by such an error."""


def train_recipe(
    recipe: Recipe,
    output: Path,
    resume: bool,
    callbacks: Sequence[Callback] = (),
    allow: Sequence[str] = (),
    chosen: int | None = None,
    force: bool = False,
) -> TrainResult:
    """Run a resolved recipe in a directory; see ``branchtree.train``. ``chosen`` is the checkpoint to go on from."""
    if allow and not resume:
        raise RecipeError("--allow names keys that may change on --resume; leave it out, or add --resume")
    if chosen is not None and not resume:
        raise RecipeError("--checkpoint names the one to --resume from; add --resume, or start from it with --from")
    require_memory(recipe, force)
    directory = RunDirectory(output)
    inputs = read_inputs(recipe)
    accelerator = make_accelerator(recipe)
    with directory.claimed(resume) if accelerator.is_main_process else nullcontext():
        try:
            if accelerator.is_main_process:
                _ = inputs.contents  # of the files as they are now, not when the first checkpoint is written
            checkpoints = directory.checkpoints
            found = agreed_checkpoint(accelerator, checkpoints, inputs, allow, chosen) if resume else None
            resumed_at = (iteration_of(found) if found else 0) if resume else None
            with running_trackers(recipe, directory, accelerator, resumed_at) as trackers:
                session = open_session(inputs, directory, accelerator, found)
                return Trainer(session, [*inputs.callbacks, *callbacks], trackers).run(resume, chosen is not None)
        except BaseException:
            if accelerator.is_main_process:
                directory.discard_untrained()
            raise


@dataclass(frozen=True)
class Standing:
    """Where the run was when its last iteration was done."""

    done: int  # iterations
    updates: int  # that this process had taken
    progress: Progress


class Trainer:
    """Runs the iterations of one session."""

    def __init__(self, session: Session, callbacks: Sequence[Callback], trackers: Trackers | None = None) -> None:
        self._session = session
        self._main = session.accelerator.is_main_process
        self._reporter = Reporter(session, callbacks, trackers or Trackers())
        self._continuation = ContinuationWatch()
        self._keeper = CheckpointKeeper(session)
        self._standing = self._stand(0)

    def run(self, resume: bool, chosen: bool = False) -> TrainResult:
        """Train to the end, or until asked to stop; then write ``final/``.

        ``chosen`` says that a person chose the checkpoint to go on from. Whatever fails once an iteration is done, what
        was learnt until then is saved first. Raises one of ``REMEDIES`` or DivergenceError, which say what is
        kept, and whatever else is raised while it trains.
        """
        session, recipe = self._session, self._session.recipe
        started = time.perf_counter()
        with self._saying_what_is_kept(), self._keeper, self._saving_on_failure():
            done = self._start(resume, chosen)
            with StopRequest() as stop:
                for iteration in range(done, recipe.run.iterations):
                    self._keeper.check()
                    self._iteration(iteration)
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

    @contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        """Add to the error of a block what it leaves of the run, and how to go on."""
        try:
            yield
        except tuple(REMEDIES) as error:
            raise type(error)(f"{error}. {self._keeper.kept(REMEDIES[type(error)])}") from error
        except DivergenceError as error:
            remedy, flags = "with a lower optim.lr or optim.max_grad_norm", " and --allow with the key that is changed"
            raise DivergenceError(f"{error}. {self._keeper.kept(remedy, flags, 'last good ')}") from error

    @contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """Save what was learnt where a block ends by an error."""
        try:
            yield
        except Exception as error:
            self._keep(error)
            raise

    def _stand(self, done: int) -> Standing:
        """The weights are those after ``done`` iterations, and all that is logged of them is written."""
        trained = self._session.trained
        return Standing(done, trained.guard.admitted, trained.progress())

    def _keep(self, error: Exception) -> None:
        """Save what was learnt before a run ends by an error. Raises DivergenceError if the weights have diverged.

        Weights in the middle of an iteration's steps are not saved. Where they are sharded, saving takes all processes,
        and only rewards and data fail on all together.
        """
        session, standing = self._session, self._standing
        trained, joint = session.trained, session.processes.joint
        changed = trained.guard.admitted != standing.updates
        together = session.accelerator.num_processes == 1 or isinstance(error, RewardError | DataError)
        if (joint and not together) or not (joint or self._main) or isinstance(error, DivergenceError):
            return
        if not (changed or standing.done):
            self._blame_model(error)
            return
        problem = self._divergence(error)
        if problem is not None and not isinstance(error, tuple(REMEDIES)):
            raise problem from error
        if changed or problem is not None:
            return
        trained.go_back(standing.progress)
        try:
            self._keeper.save(standing.done)
        except Exception as second:  # the first failure is the one to report
            log.warning("what was learnt since the last checkpoint is lost: %s", second)

    def _blame_model(self, error: Exception) -> None:
        """Raise ModelError if a reward failed only since the model, before it was trained, makes no finite sample."""
        policy = self._probe()
        if not isinstance(error, RewardError) or policy is None:
            return
        try:
            fault = find_fault(self._session, policy)
        except Exception as second:
            log.warning("whether the model makes finite samples cannot be found out: %s", second)
            return
        if fault is not None:
            raise ModelError(f"before anything was trained, {fault}; {REMEDY}") from error

    def _divergence(self, error: Exception | None = None) -> DivergenceError | None:
        """Return what to raise if the weights have diverged: an ``error`` that ended the run is then only a symptom."""
        policy, processes = self._probe(), self._session.processes
        together = error is None or processes.joint
        if together and not all(processes.everyone(policy is not None)):
            return None  # one that has no encoded prompt could not take part in the others' forwards
        if policy is None:
            return None
        try:
            problem = find_divergence(self._session, policy, together)
        except Exception as second:
            if error is None:
                raise
            log.warning("whether the weights have diverged cannot be found out: %s", second)
            return None
        if problem is None:
            return None
        standing = self._standing
        iteration = standing.done - (self._session.trained.guard.admitted == standing.updates)
        return DivergenceError(f"the weights have diverged in iteration {iteration}: {problem}")

    def _probe(self) -> Policy | None:
        """Return the policy under a prompt of the iteration under way or done last; None before it is encoded."""
        session, standing = self._session, self._standing
        for iteration in (standing.done, standing.done - 1):
            if 0 <= iteration < session.recipe.run.iterations:
                condition = session.conditions(iteration)[:1]
                if session.policy.cache.holds(condition):
                    return session.policy.under(condition)
        return None

    def _any_process(self, flag: bool) -> bool:
        """Return whether the flag is set on any process: a signal may reach them between different iterations."""
        accelerator = self._session.accelerator
        return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum"))

    def _start(self, resume: bool, chosen: bool) -> int:
        """Take up the session's checkpoint or begin; returns the iterations done before."""
        session, recipe = self._session, self._session.recipe
        done = self._keeper.restore(chosen) if resume else 0
        self._standing = self._stand(done)
        if resume:
            session.limits.recall(session.output)
        if self._main:
            session.output.rewind(done)
            session.output.write_recipe(recipe)
            self._continuation.recall(session.output.rows(METRICS))
        session.failures.recall(session.accelerator, session.output)
        self._reporter.start(done)
        session.policy.cache.prepare(self._upcoming(done))
        if done and done == recipe.run.iterations:
            self._reporter.export()
        # A run may have stopped between a checkpoint and what was to be shown then.
        evaluated, sampled = self._reporter.shown(done) if self._main and done else (False, False)
        self._show(done, not self._any_process(evaluated), not self._any_process(sampled))
        return done

    def _upcoming(self, done: int) -> Iterator[Condition]:
        """Each condition that this process will train on, once."""
        session, recipe = self._session, self._session.recipe
        order, conditions, seen = session.order, session.inputs.conditions, set[int]()
        for iteration in range(done, recipe.run.iterations):
            for prompt_id in session.prompt_ids(iteration):
                index = order.index(prompt_id)
                if index not in seen:
                    seen.add(index)
                    yield conditions[index]
            if len(seen) == len(conditions):
                return

    def _iteration(self, iteration: int) -> None:
        session = self._session
        done = iterate(session, iteration)
        if done.comparison:
            self._continuation.look(done.comparison)
        whole = gather_record(session, done)
        metrics = metrics_of(session, done, whole)
        if session.trained.splits is not None:
            session.trained.splits.observe(iteration, session.processes, session.team, done.group.topology, done.credit)
        self._reporter.record(iteration, metrics, spreads_by_plan(whole.plans, whole.spreads), done.timing)
        self._standing = self._stand(iteration + 1)
        session.limits.agree(session.accelerator, session.output)
        if self._main and session.records_tree(iteration):
            group = done.group
            with session.output.writing(TREES):
                write_tree(
                    session.output.root / TREES,
                    iteration,
                    done.batch.conditions[0].prompt,
                    group.topology,
                    group.scores,
                    done.credit,
                    group.thumbnails,
                )
        self._reporter.announce(iteration, metrics)

    def _after(self, done: int, stopping: bool) -> None:
        """Write a checkpoint where it is due, at the end ``final/``, and then show what is to be shown."""
        recipe = self._session.recipe
        last = done == recipe.run.iterations
        if last or stopping or done % recipe.run.checkpoint_every == 0:
            problem = self._divergence()
            if problem is not None:
                raise problem
            self._keeper.save(done)
        if last:
            self._keeper.wait()
            self._reporter.export()
        self._show(done)
        self._session.accelerator.wait_for_everyone()

    def _show(self, done: int, evaluation: bool = True, samples: bool = True) -> None:
        """Held-out figures and samples, if they are wanted and it is their turn."""
        recipe = self._session.recipe
        ends = done in (0, recipe.run.iterations)
        every, sample_every = recipe.evaluation.every if recipe.evaluation else None, recipe.run.sample_every
        evaluating = evaluation and (ends or bool(every and done % every == 0))
        sampling = samples and sample_every is not None and (ends or done % sample_every == 0)
        if evaluating or sampling:  # putting the average in and out copies every trained weight
            with self._session.trained.as_exported():
                if evaluating:
                    self._reporter.evaluate(done)
                if sampling:
                    self._reporter.sample(done)
