"""Samples that cannot be scored: the log of them, and the share over the last iterations that ends a run."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.errors import RewardError, shortened
from branchtree.files.reading import whole_text
from branchtree.plugins.values import Condition
from branchtree.recipe.schema import ScoringSection
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.training.faults import REMEDY, are_faults

SHOWN = 2
REWARD, INVALID = "reward/", "/invalid"  # around a label, the metric that counts its failures
NO_REASON = "the reward gave none"
LISTED = 20
"""How many failed samples of an iteration the log names; of the others it has the number, by reward and reason."""
REASONS = 10
"""How many reasons are counted separately in that line; the rarer ones are counted together."""
TEXT = 500
"""Characters of a prompt or a reason that the log repeats."""
OTHER_REASONS = "other reasons"

FailureRow = dict[str, Any]
"""A line of the log."""


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


@dataclass(frozen=True)
class Leaves:
    """A process's scored leaves, and how the log names them."""

    topology: Topology
    prompt_ids: Sequence[int]
    conditions: Sequence[Condition]
    first: int  # the position of its first prompt among those of the iteration

    def failed(self, scores: Mapping[str, Scores]) -> list[FailureRow]:
        """The first few leaves that a reward could not score, by prompt and leaf, each reward on a line of its own."""
        root, depth = self.topology.leaf_root.tolist(), self.topology.steps
        found = [(row, label) for label, score in scores.items() for row in (~score.valid).nonzero()[:, 0].tolist()]
        rows = []
        for row, label in sorted(found, key=lambda one: one[0])[:LISTED]:
            prompt = root[row]
            leaf = self.topology.shares[prompt].leaves[row - self.topology.span(prompt, depth).start]
            condition = self.conditions[prompt]
            rows.append(
                {
                    "position": self.first + prompt,
                    "prompt_id": self.prompt_ids[prompt],
                    "prompt": logged(condition.prompt),
                    "source": logged(condition.location),
                    "leaf": leaf,
                    "reward": label,
                    "reason": logged(scores[label].reasons.get(row, NO_REASON)),
                }
            )
        return rows


def logged(text: str) -> str:
    """A text as the log has it: its beginning, without half characters."""
    return shortened(whole_text(text), TEXT)


def log_rows(everyone: Sequence[Mapping[str, Failures]], listed: Sequence[Sequence[FailureRow]]) -> list[FailureRow]:
    """The log's lines of an iteration, from all processes' counts and the failed leaves that each lists.

    After ``LISTED`` of them there is a line for each reward with the number of the rest.
    """
    rows = sorted((row for share in listed for row in share), key=lambda row: (row["position"], row["leaf"]))[:LISTED]
    rest = {label: Counter[str]() for share in everyone for label in share}
    for share in everyone:
        for label, failures in share.items():
            for reason, count in failures.reasons.items():
                rest[label][logged(reason)] += count
    for row in rows:
        rest[row["reward"]][row["reason"]] -= 1
    lines = [{name: value for name, value in row.items() if name != "position" and value != ""} for row in rows]
    for label, reasons in rest.items():
        left = +reasons
        if left:
            often = dict(left.most_common(REASONS))
            others = left.total() - sum(often.values())
            lines.append(
                {
                    "reward": label,
                    "more": left.total(),
                    "reasons": {**often, **({OTHER_REASONS: others} if others else {})},
                }
            )
    return lines


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

    def check(
        self,
        accelerator: Any,
        scores: Mapping[str, Scores],
        leaves: Leaves | None = None,
        log: Callable[[FailureRow], None] | None = None,
    ) -> None:
        """Count an iteration's failures. Raises RewardError, on every process, if there are too many.

        With the ``leaves`` of each process, the main one gives every line about them to ``log`` first.
        """
        from accelerate.utils import gather_object

        mine = (count_failures(scores), [] if leaves is None else leaves.failed(scores))
        shares: list[tuple[dict[str, Failures], list[FailureRow]]] = gather_object([mine])
        everyone = [counts for counts, _ in shares]
        if log is not None and accelerator.is_main_process:
            for row in log_rows(everyone, [listed for _, listed in shares]):
                log(row)
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
