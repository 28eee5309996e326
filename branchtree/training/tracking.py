"""Experiment trackers: started before the model is loaded, continued on resume, and never sent one step twice.

Metrics of iteration i are step i. Held-out figures after n iterations are step n, and are sent together with that
iteration's metrics, or at the end of the run: a tracker that closes a step when it goes on to the next gets each once.
What a run that was killed sent beyond its checkpoint, TensorBoard takes back; to the others these steps are not sent
again.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from branchtree.errors import BranchTreeError, RecipeError, TrackerError
from branchtree.files.names import project_name
from branchtree.files.writing import write_atomically
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import METRICS, TRACKERS, RunDirectory

log = logging.getLogger("branchtree")

STATE = "state.json"
TENSORBOARD = "tensorboard"


class Trackers:
    """The trackers that are running, on the main process; none on the others.

    ``output`` is the run's directory, ``run`` the identifier that the run has with all of them, and ``sent`` the last
    step that went to those that take nothing back.
    """

    def __init__(
        self, running: Sequence[Any] = (), output: RunDirectory | None = None, run: str = "", sent: int = -1
    ) -> None:
        self._running = list(running)
        self._output = output or RunDirectory(Path())
        self._run = run
        self._sent = sent
        self._waiting: dict[str, float] = {}

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Send an iteration's metrics. Raises TrackerError if a tracker fails."""
        self._send({**self._waiting, **metrics}, iteration)
        self._waiting = {}

    def evaluation(self, means: Mapping[str, float]) -> None:
        """Take held-out figures, which are sent with the next iteration's metrics or at the end."""
        self._waiting = {f"evaluation/{label}": mean for label, mean in means.items()}

    def complete(self, done: int) -> None:
        """Send what is left when all ``done`` iterations of the run are done. Raises TrackerError."""
        if self._running and self._waiting:
            self._send(self._waiting, done)
            self._sent = max(self._sent, done)
            self.write_state()

    def write_state(self) -> None:
        """Write what a later resume must know of the trackers. Raises OutputError."""
        state = {"run": self._run, "sent": self._sent}
        with self._output.writing(TRACKERS):
            write_atomically(self._output.root / TRACKERS / STATE, json.dumps(state).encode())

    def close(self) -> None:
        """End the trackers; one that cannot end is named in the log."""
        if not self._running:
            return
        with self._output.writing(TRACKERS, growing=True):
            for tracker in self._running:
                try:
                    tracker.finish()
                except Exception as error:  # a tracker can raise anything
                    log.warning("run.trackers: '%s' could not be closed: %s", tracker.name, _described(error))

    def _send(self, figures: Mapping[str, float], step: int) -> None:
        for tracker in self._running:
            if tracker.name != TENSORBOARD and step <= self._sent:
                continue
            try:
                tracker.log(dict(figures), step=step)
            except Exception as error:  # a tracker can raise anything
                raise TrackerError(f"run.trackers: '{tracker.name}' failed: {_described(error)}") from error


@contextmanager
def running_trackers(
    recipe: Recipe, output: RunDirectory, accelerator: Any, resumed_at: int | None
) -> Iterator[Trackers]:
    """Run the recipe's trackers in a block, for a new run or one resumed after ``resumed_at`` iterations.

    Raises RecipeError on all processes, having removed what it wrote, if one cannot start.
    """
    from accelerate.utils import broadcast_object_list

    trackers, problem = Trackers(), None
    if recipe.run.trackers:
        if accelerator.is_main_process:
            try:
                trackers = _start(recipe, output, resumed_at)
            except BranchTreeError as error:
                problem = error
        [problem] = broadcast_object_list([problem])
        if problem is not None:
            raise problem
    try:
        yield trackers
    except Exception:
        trackers.close()
        raise
    trackers.close()


def _start(recipe: Recipe, output: RunDirectory, resumed_at: int | None) -> Trackers:
    folder = output.root / TRACKERS
    run, sent = (uuid.uuid4().hex, -1) if resumed_at is None else _state(folder, output)
    started: list[Any] = []
    before = {folder, *folder.rglob("*")} if folder.exists() else set()
    try:
        with output.writing(TRACKERS, growing=True):
            folder.mkdir(exist_ok=True)
            for name in dict.fromkeys(recipe.run.trackers):
                try:
                    started.append(_begin(name, recipe, output, run, resumed_at))
                except Exception as error:  # a tracker can raise anything
                    raise RecipeError(
                        f"run.trackers: '{name}' cannot start: {_described(error)}; set it up, or leave it out with "
                        f"run.trackers=[{', '.join(other for other in recipe.run.trackers if other != name)}]"
                    ) from error
        trackers = Trackers(started, output, run, sent)
        trackers.write_state()
    except BaseException:
        Trackers(started, output).close()
        _remove_new(folder, before)
        raise
    return trackers


def _remove_new(folder: Path, before: AbstractSet[Path]) -> None:
    """Remove what came into a folder since ``before``: this process alone writes to the run."""
    now = sorted([folder, *folder.rglob("*")], reverse=True) if folder.exists() else []
    for path in (path for path in now if path not in before):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def _state(folder: Path, output: RunDirectory) -> tuple[str, int]:
    """Return the run's identifier and the last step that was sent, before the logs are cut at the checkpoint."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        run, sent = str(state["run"]), int(state["sent"])
    except (OSError, ValueError, KeyError, TypeError):
        run, sent = uuid.uuid4().hex, -1
    rows = output.rows(METRICS)
    return run, max(sent, rows[-1]["iteration"] if rows else -1)


def _begin(name: str, recipe: Recipe, output: RunDirectory, run: str, resumed_at: int | None) -> Any:
    """Start one tracker, whose files lie in the run's directory as far as it allows."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = output.root / TRACKERS
    resumed = resumed_at is not None
    own: Mapping[str, Mapping[str, Any]] = {
        TENSORBOARD: {"purge_step": resumed_at} if resumed else {},
        "wandb": {"dir": str(folder), "id": run, "name": output.root.resolve().name, "resume": "allow"},
        "trackio": {"name": f"{project_name(output.root.resolve().name)}-{run[:8]}", "resume": "allow"},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": resumed},
        "swanlab": {"logdir": str(folder / "swanlab")},
    }
    made = LOGGER_TYPE_TO_CLASS[name]
    where = [str(folder)] if made.requires_logging_directory else []
    tracker = made(project_name(recipe.name), *where, **own.get(name, {}))
    tracker.start()
    if not (resumed and name == TENSORBOARD):  # which would list it as another run
        tracker.store_init_configuration({"recipe": json.dumps(recipe.model_dump(mode="json"))})
    return tracker


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
