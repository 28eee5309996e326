"""What a run tells: its figures, evaluations, samples and result, on disk, to trackers and to callbacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CallbackError, reason_of
from branchtree.files.writing import write_atomically
from branchtree.pictures.grid import sample_index, write_grid
from branchtree.plugins.base import Callback
from branchtree.run.directory import EVALUATION, METRICS, SAMPLES, SUMMARY, TIMING
from branchtree.training.evaluation import Figure
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch
from branchtree.training.tracking import Trackers

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


class Reporter:
    """Tells of one session's run. The main process writes; evaluations and samples are the work of all."""

    def __init__(self, session: Session, callbacks: Sequence[Callback], trackers: Trackers) -> None:
        self._session = session
        self._main = session.accelerator.is_main_process
        self._callbacks = list(callbacks) if self._main else []
        self._trackers = trackers
        self._warned = False

    def start(self, done: int) -> None:
        """The run begins, or goes on after ``done`` iterations."""
        session, recipe = self._session, self._session.recipe
        self._call("on_start", session.output.root, done, recipe.run.iterations)
        if not self._main:
            return
        if session.base is not None:
            self._write_evaluation(0, session.base)
        for row in session.output.rows(EVALUATION):
            if row["iteration"] == done > 0 and row.get("identity") == session.inputs.identity:
                means = {label: figure["mean"] for label, figure in row["figures"].items()}
                self._trackers.evaluation({label: mean for label, mean in means.items() if mean is not None})

    def record(self, iteration: int, metrics: Mapping[str, float], watch: Stopwatch) -> None:
        """Write an iteration's figures down, with which it is done."""
        if self._main:
            output = self._session.output
            output.append(METRICS, {"iteration": iteration, **metrics})
            output.append(TIMING, {"iteration": iteration, **watch.report()})

    def announce(self, iteration: int, metrics: dict[str, float]) -> None:
        """Give an iteration's figures to trackers and callbacks."""
        if not self._main:
            return
        self._trackers.iteration(iteration, metrics)
        self._warn_of_mismatch(metrics)
        self._call("on_iteration", iteration, metrics)

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback. Raises CallbackError, naming the callback, if one raises anything."""
        for callback in self._callbacks:
            try:
                getattr(callback, hook)(*arguments)
            except Exception as error:  # somebody else's code can raise anything
                kind = type(callback)
                raise CallbackError(
                    f"the callback {kind.__module__}.{kind.__qualname__} failed in {hook}: {reason_of(error)}"
                ) from error

    def _warn_of_mismatch(self, metrics: dict[str, float]) -> None:
        """Say once that the clip range lies below the numerical noise of densities, which would silence edges."""
        mismatch, clip = metrics.get("log_prob/mismatch_max", 0.0), self._session.recipe.loss.clip_range
        if mismatch <= clip or self._warned or self._session.updater.objective.looks_back:
            return  # what looks back compares with densities that have no mismatch
        self._warned = True
        log.warning(
            "densities of rollout and training differ by up to %.1e, more than loss.clip_range %.1e: from an "
            "iteration's second optimiser step on, edges are clipped by rounding alone; raise the clip range, set "
            "loss.old_log_prob to recomputed, or use fp32",
            mismatch,
            clip,
        )

    def evaluate(self, done: int) -> None:
        """Held-out figures after ``done`` iterations."""
        session = self._session
        if session.evaluator is None:
            return
        figures = session.evaluator.figures(session.accelerator)
        if not self._main:
            return
        self._trackers.evaluation(self._write_evaluation(done, figures))

    def _write_evaluation(self, done: int, figures: Mapping[str, Figure]) -> dict[str, float]:
        """Write held-out figures with what they depend on, and hand the means to the callbacks; returns the means."""
        session = self._session
        rows = {label: asdict(figure) for label, figure in figures.items()}
        session.output.append(EVALUATION, {"iteration": done, "identity": session.inputs.identity, "figures": rows})
        means = {label: figure.mean for label, figure in figures.items() if figure.mean is not None}
        self._call("on_evaluation", done, means)
        return means

    def sample(self, done: int) -> None:
        """A grid of samples after ``done`` iterations."""
        session = self._session
        if not self._main and not session.processes.joint:
            return
        inputs, count = session.inputs, session.recipe.run.sample_prompts
        conditions = (inputs.held_out_conditions or inputs.conditions)[:count]
        policy = session.policy.under(conditions)
        latents = policy.sample(
            policy.initial(session.recipe.tree.noise_seed, 0, [(i, 0) for i in range(len(conditions))])
        )
        if not self._main:
            return
        encoded = policy.encoded(range(len(latents)))
        decoded = session.limits.decode.each(
            len(latents), lambda rows: encoded[rows].decode(inputs.model, latents[rows])
        )
        samples = [each for _, each in decoded]
        inputs.model.release_frozen()
        with session.output.writing(SAMPLES):
            write_grid(session.output.root / SAMPLES, done, samples, conditions)
        self._call("on_samples", done, samples, conditions)

    def shown(self, done: int) -> tuple[bool, bool]:
        """Return whether this process, the main one, wrote held-out figures and samples after ``done`` iterations."""
        output = self._session.output
        sampled = sample_index(output.root / SAMPLES, done).is_file()
        return output.evaluated(done, self._session.inputs.identity), sampled

    def export(self) -> None:
        """Write ``final/``."""
        session = self._session
        weights = session.trained.exported()
        if self._main:
            output, model = session.output, session.inputs.model
            with output.writing(output.final.name):
                output.ledger.write_folder(output.final, lambda folder: model.export(folder, weights))

    def finish(self, done: int, seconds: float) -> None:
        """Write the summary; with it the run is finished."""
        if not self._main:
            return
        output, recipe = self._session.output, self._session.recipe
        summary: dict[str, Any] = {"iterations": done, "seconds": seconds, "device": str(self._session.device)}
        if recipe.model.start is not None:
            files = self._session.inputs.contents.get("model.start")
            summary["start"] = {"path": recipe.model.start, "files": files}
        with output.writing(SUMMARY):
            write_atomically(output.root / SUMMARY, json.dumps(summary).encode())
        self._trackers.complete(done)
        self._call("on_end", output.root)

    def result(self, done: int, finished: bool) -> TrainResult:
        """Return what the run came to, with held-out figures of the recipe's prompts and rewards alone."""
        output = self._session.output
        found: dict[bool, dict[str, Figure]] = {}
        if self._main:
            identity = self._session.inputs.identity
            for row in output.rows(EVALUATION):
                if row.get("identity") == identity:
                    figures = {label: Figure(**figure) for label, figure in row["figures"].items()}
                    found[row["iteration"] > 0] = figures

        return TrainResult(
            output=output.root,
            iterations=done,
            finished=finished,
            main_process=self._main,
            before=found.get(False),
            after=found.get(True),
        )
