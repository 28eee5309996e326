"""When failing rewards end a run: a share of samples that cannot be scored, over the last iterations."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchtree.errors import RewardError
from branchtree.protocols import Scores
from branchtree.recipe.schema import ScoringSection
from branchtree.training.faults import REMEDY, are_faults
from branchtree.training.rundir import METRICS, RunDirectory

SHOWN = 2
REWARD, INVALID = "reward/", "/invalid"  # around a label, the metric that counts its failures
NO_REASON = "the reward gave none"


@dataclass(frozen=True)
class Failures:
    """One reward's failures in one iteration."""

    invalid: int
    samples: int
    reasons: Mapping[str, int] = field(default_factory=dict)  # how often each was given


def count_failures(scores: Mapping[str, Scores]) -> dict[str, Failures]:
    """Each reward's failures, by label."""
    return {label: _count(score) for label, score in scores.items()}


def _count(scores: Scores) -> Failures:
    invalid = [row for row, good in enumerate(scores.valid.tolist()) if not good]
    reasons = Counter(scores.reasons.get(row, NO_REASON) for row in invalid)
    return Failures(len(invalid), len(scores), dict(reasons))


class FailureWatch:
    """Adds up failures over all processes and ends the run when they pass ``scoring.max_invalid``.

    Rewards whose labels are in ``ignored``, as those of weight 0, may fail as they like.
    """

    def __init__(self, section: ScoringSection, ignored: Container[str] = ()) -> None:
        self._section, self._ignored = section, ignored
        self._past: deque[Mapping[str, Failures]] = deque(maxlen=section.window)

    def recall(self, accelerator: Any, output: RunDirectory) -> None:
        """Take up the failures of iterations that were done before this process started, as the run recorded them."""
        from accelerate.utils import broadcast_object_list

        rows = output.rows(METRICS)[-self._section.window :] if accelerator.is_main_process else []
        shared = broadcast_object_list([rows])
        self._past.extend(_recorded(row) for row in shared[0])

    def check(self, accelerator: Any, scores: Mapping[str, Scores]) -> None:
        """Count an iteration's failures. Raises RewardError, on every process, if there are too many."""
        from accelerate.utils import gather_object

        everyone: list[dict[str, Failures]] = gather_object([count_failures(scores)])
        self._past.append({label: _total([share[label] for share in everyone]) for label in scores})
        for label in (label for label in scores if label not in self._ignored):
            window = [past[label] for past in self._past if label in past]
            total = _total(window)
            if total.invalid > self._section.max_invalid * total.samples:
                raise RewardError(self._message(label, total, len(window)))

    def _message(self, label: str, total: Failures, iterations: int) -> str:
        span = "iteration" if iterations == 1 else f"{iterations} iterations"
        often = Counter(total.reasons).most_common(SHOWN)
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in often)
        return (
            f"reward '{label}' gave no valid value for {total.invalid} of {total.samples} samples of the last {span} "
            f"({total.invalid / total.samples:.0%}; scoring.max_invalid allows {self._section.max_invalid:.0%})."
            + (f" Most often: {reasons}." if reasons else "")
            + (
                f" So {REMEDY}"
                if are_faults(total.reasons)
                else " Fix the reward and go on with --resume, or raise scoring.max_invalid"
            )
        )


def _recorded(row: Mapping[str, float]) -> dict[str, Failures]:
    """The failures in a line of the metrics, by label."""
    counts = {name.removesuffix(INVALID): value for name, value in row.items() if name.endswith(INVALID)}
    leaves = int(row.get("leaves/scored", 0))
    return {name.removeprefix(REWARD): Failures(int(value), leaves) for name, value in counts.items()}


def _total(failures: Sequence[Failures]) -> Failures:
    reasons: Counter[str] = Counter()
    for failure in failures:
        reasons.update(failure.reasons)
    return Failures(sum(f.invalid for f in failures), sum(f.samples for f in failures), dict(reasons))
