"""The training loop: rollout, score, credit, update; one readable page and its helpers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.credit import Credit, assign_credit
from branchtree.errors import (
    BranchTreeError,
    DataError,
    OutputError,
    RecipeError,
    RewardError,
)
from branchtree.families import collect
from branchtree.protocols import Callback, Condition, Scores
from branchtree.recipe.schema import Recipe
from branchtree.training.continuation import ContinuationWatch, compare_continuation, comparing_forwards, is_due
from branchtree.training.disk import writing
from branchtree.training.evaluation import Figure
from branchtree.training.growth import grow_and_score, join_forwards
from branchtree.training.interrupt import StopRequest
from branchtree.training.keeper import CheckpointKeeper
from branchtree.training.metrics import ShareRecord, iteration_metrics, merged
from branchtree.training.policy import velocity_function
from branchtree.training.restore import agreed_checkpoint
from branchtree.training.rundir import EVALUATION, METRICS, TIMING, RunDirectory, write_atomically, write_folder
from branchtree.training.samples import thumbnails, write_grid, write_tree
from branchtree.training.sampling import sample_latents
from branchtree.training.session import Session, make_accelerator, open_session, read_inputs
from branchtree.training.teams import GroupRecord
from branchtree.training.timing import Stopwatch
from branchtree.training.update import Policies, UpdateRecord, partition
from branchtree.tree import BranchTree, Topology, grow

log = logging.getLogger("branchtree")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    output: Path
    iterations: int  # done in all
    finished: bool  # False if it was asked to stop early
    main_process: bool  # whether this process is the one that reports
    before: dict[str, Figure] | None  # held-out figures
    after: dict[str, Figure] | None


def train_recipe(
    recipe: Recipe, output: Path, resume: bool, callbacks: Sequence[Callback] = (), allow: Sequence[str] = ()
) -> TrainResult:
    """Run a resolved recipe in a directory; see ``branchtree.train``."""
    if allow and not resume:
        raise RecipeError("--allow names keys that may change on --resume; leave it out, or add --resume")
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
        self._callbacks = list(callbacks) if self._main else []
        self._warned = False
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
            self._finish(done, time.perf_counter() - started)
        session.accelerator.end_training()
        return self._result(done, finished)

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
        if recipe.run.trackers:
            session.accelerator.init_trackers(
                recipe.name, config={"recipe": json.dumps(recipe.model_dump(mode="json"))}
            )
        for callback in self._callbacks:
            callback.on_start(session.output.root, done, recipe.run.iterations)
        if done == 0:
            self._evaluate(0)
            self._sample(0)
        return done

    def _iteration(self, iteration: int) -> None:
        session, recipe = self._session, self._session.recipe
        watch = Stopwatch(session.device)
        ids = session.order.batch(iteration, recipe.batch.prompts)[session.share]
        conditions = [session.inputs.conditions[session.order.index(prompt_id)] for prompt_id in ids]
        with watch.phase("encode"):
            conditioning = self._encoded(conditions)
        recorded = session.team.place == 0 and iteration % recipe.run.tree_every == 0
        tree, scores, media = session.lockstep.together(
            lambda: grow_and_score(session, iteration, ids, conditions, conditioning, watch, recorded)
        )
        session.failures.check(session.accelerator, scores)
        with watch.phase("credit"):
            log_prob, dimensions = self._mean_log_prob(tree)
            group = session.team.whole(GroupRecord(tree.topology, log_prob, scores, thumbnails(media)))
            credit = self._credit(group.topology, group.log_prob, group.scores, iteration, dimensions)
        # Before the weights change: the states come from these.
        check = self._continuation_check(iteration, tree, scores, conditions[0], conditioning, watch)
        with watch.phase("update"):
            update = self._update(tree, group.topology, credit, conditioning, ids, iteration)
        session.limits.settle(session.accelerator, session.output)
        rows = tree.topology.rollout_rows
        share = ShareRecord(tree.topology.plans, tuple(group.log_prob), dimensions, group.scores, rows, update)
        metrics = {**self._metrics(share, group.topology, credit, iteration), **check}
        if self._main:
            if recorded:
                trees = session.output.root / "trees"
                with writing(trees):
                    prompt = conditions[0].prompt
                    write_tree(trees, iteration, prompt, group.topology, group.scores, credit, group.thumbnails)
            self._log(iteration, metrics, watch)

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

    def _mean_log_prob(self, tree: BranchTree) -> tuple[list[Tensor], int]:
        """Edge densities averaged over latent dimensions, and their number."""
        dimensions = tree.leaves[0].numel()
        divisor = dimensions if self._session.sampler.reduction == "sum" else 1
        return [level / divisor for level in tree.log_prob], dimensions

    def _credit(
        self,
        topology: Topology,
        log_prob: Sequence[Tensor],
        scores: Mapping[str, Scores],
        iteration: int,
        dimensions: int,
    ) -> Credit:
        session = self._session
        return assign_credit(
            topology,
            log_prob,
            scores,
            {reward.label: reward.weight for reward in session.inputs.rewards},
            session.credit_rule,
            session.pruning_rule,
            iteration,
            dimensions,
        )

    def _update(
        self,
        tree: BranchTree,
        whole: Topology,
        credit: Credit,
        conditioning: dict[str, Tensor],
        ids: Sequence[int],
        iteration: int,
    ) -> UpdateRecord:
        session, recipe = self._session, self._session.recipe
        parts = partition(
            collect(whole, credit.advantages, credit.keep),
            recipe.optim.steps_per_iteration,
            recipe.seed,
            iteration,
            ids,
            session.share.start,
        )
        parts = [session.team.own(families, whole, tree.topology) for families in parts]
        trained = velocity_function(
            session.inputs.model, conditioning, session.accelerator.autocast, session.updater.engine.module
        )
        reference = session.reference_velocity(conditioning, iteration)
        return session.updater.run(tree, parts, Policies(trained, reference), iteration)

    def _metrics(self, share: ShareRecord, topology: Topology, credit: Credit, iteration: int) -> dict[str, float]:
        """The iteration's figures over all processes, whose shares come in the order of their prompts."""
        from accelerate.utils import gather_object

        session = self._session
        whole = merged(gather_object([share]), session.team.members)
        if session.accelerator.num_processes > 1:
            topology = grow(whole.plans)
            credit = self._credit(topology, whole.log_prob, whole.scores, iteration, whole.dimensions)
        factor = session.inputs.model.rows_per_prediction
        metrics = iteration_metrics(topology, whole, credit, factor)
        return {**metrics, "lr": float(session.updater.optimizer.param_groups[0]["lr"])}

    def _log(self, iteration: int, metrics: dict[str, float], watch: Stopwatch) -> None:
        session = self._session
        session.output.append(METRICS, {"iteration": iteration, **metrics})
        session.output.append(TIMING, {"iteration": iteration, **watch.report()})
        self._track(metrics, iteration)
        self._warn_of_mismatch(metrics)
        for callback in self._callbacks:
            callback.on_iteration(iteration, metrics)

    def _track(self, figures: Mapping[str, float], step: int) -> None:
        session = self._session
        if session.recipe.run.trackers:
            with writing(session.output.root / "trackers"):
                session.accelerator.log(dict(figures), step=step)

    def _warn_of_mismatch(self, metrics: dict[str, float]) -> None:
        """Say once that the clip range lies below the numerical noise of densities, which would silence edges."""
        mismatch, clip = metrics.get("log_prob/mismatch_max", 0.0), self._session.recipe.loss.clip_range
        if mismatch <= clip or self._warned:
            return
        self._warned = True
        log.warning(
            "densities of rollout and training differ by up to %.1e, more than loss.clip_range %.1e: from an "
            "iteration's second optimiser step on, edges are clipped by rounding alone; raise the clip range, set "
            "loss.old_log_prob to recomputed, or use fp32",
            mismatch,
            clip,
        )

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
                    self._evaluate(done)
                if sampling:
                    self._sample(done)
        if last or stopping or done % recipe.run.checkpoint_every == 0:
            self._keeper.save(done)
        session.accelerator.wait_for_everyone()

    def _evaluate(self, done: int) -> None:
        session = self._session
        if session.evaluator is None:
            return
        figures = session.evaluator.figures(session.accelerator)
        if not self._main:
            return
        rows = {label: asdict(figure) for label, figure in figures.items()}
        session.output.append(EVALUATION, {"iteration": done, "figures": rows})
        means = {label: figure.mean for label, figure in figures.items() if figure.mean is not None}
        self._track({f"evaluation/{label}": mean for label, mean in means.items()}, done)
        for callback in self._callbacks:
            callback.on_evaluation(done, means)

    def _sample(self, done: int) -> None:
        session = self._session
        if not self._main and not session.lockstep.joint:
            return
        inputs, count = session.inputs, session.recipe.run.sample_prompts
        conditions = (inputs.held_out_conditions or inputs.conditions)[:count]
        latents = sample_latents(
            inputs.model,
            session.cache,
            session.sampler,
            session.accelerator.autocast,
            conditions,
            [(place, 0) for place in range(len(conditions))],
            session.recipe.tree.noise_seed,
            session.device,
            session.limits.rollout,
        )
        if not self._main:
            return
        decoded = session.limits.decode.each(len(latents), lambda rows: inputs.model.decode(latents[rows]))
        media = [part for _, part in decoded]
        inputs.model.release_frozen()
        prompts = [condition.prompt for condition in conditions]
        samples = session.output.root / "samples"
        with writing(samples):
            write_grid(samples, done, media, prompts)

    def _finish(self, done: int, seconds: float) -> None:
        """Write ``final/`` and the summary."""
        session = self._session
        weights = session.trained.exported()
        if not self._main:
            return
        with writing(session.output.final):
            write_folder(session.output.final, lambda folder: session.inputs.model.export(folder, weights))
        summary = {"iterations": done, "seconds": seconds, "device": str(session.device)}
        path = session.output.root / "summary.json"
        with writing(path):
            write_atomically(path, json.dumps(summary).encode())
        for callback in self._callbacks:
            callback.on_end(session.output.root)

    def _result(self, done: int, finished: bool) -> TrainResult:
        output = self._session.output
        rows = output.rows(EVALUATION)

        def figures(row: dict[str, Any]) -> dict[str, Figure]:
            return {label: Figure(**figure) for label, figure in row["figures"].items()}

        return TrainResult(
            output=output.root,
            iterations=done,
            finished=finished,
            main_process=self._main,
            before=figures(rows[0]) if rows else None,
            after=figures(rows[-1]) if len(rows) > 1 else None,
        )
