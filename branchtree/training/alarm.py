"""Alarms: a trained reward rises while others fall, or falls itself, or the samples of a prompt become alike.

Every rule is a test of Student's t; prompts are compared by their ranks too. A run in which nothing of the kind happens
gives an alarm with a probability of at most 1 - ``alarm.confidence``, however long it is: each kind of alarm has a
quarter of that, look k over a kind's figures has 1 / (k (k + 1)) of the kind's, and the comparisons of a look share its
level evenly.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from branchtree.core.schedule import TreePlan
from branchtree.core.signed_rank import signed_rank_tail
from branchtree.core.student import Estimate, change_of, contrast_of, difference_of, mean_of
from branchtree.recipe.schema import Recipe, RewardSection
from branchtree.run.directory import ALARMS, EVALUATION, METRICS, SPREAD, RunDirectory
from branchtree.training.evaluation import Figure

log = logging.getLogger("branchtree")

KINDS = 4
LEAST_FALL = 0.2
"""A fall counts from this fraction of the reward's deviation on: a small effect (Cohen, 1988)."""
LEAST_ALIKE = 0.75
"""Trained rewards are compared over time if this fraction of the trees of each span have a plan of the other's."""
LEAST_DIVERSITY = 0.5
"""Diversity counts as lost below this fraction of the spread at the start."""
SMALLEST = 1e-12
"""What the logarithm of a spread of 0 is taken of."""

Spreads = Mapping[str, Sequence[float]]
"""By the tree's plan, how far apart the leaves of each of an iteration's prompts lie."""


@dataclass(frozen=True)
class Alarm:
    """An alarm at its onset; a row of the log of alarms."""

    iteration: int  # the last that was looked at
    kind: str  # auxiliary, held_out, collapse or diversity
    trained: str  # the reward that rises; empty where none does, and for diversity
    reward: str  # the one that falls; empty for diversity
    since: int  # the first iteration that was looked at
    change: float  # of ``reward``; for diversity the ratio of late to early spread
    message: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is about: while that lasts, there is no second alarm."""
        return self.kind, self.trained, self.reward


@dataclass
class AlarmWatch:
    """Looks at a run's figures as they come, on the main process; all it knows is in the run's files."""

    recipe: Recipe

    def __post_init__(self) -> None:
        rewards, evaluation = self.recipe.rewards, self.recipe.evaluation
        self._trained = {_label(each): math.copysign(1, each.weight) for each in rewards if each.weight}
        self._auxiliary = {_label(each): 1.0 for each in rewards if not each.weight}
        judges = evaluation.rewards if evaluation else ()
        self._held_out = {_label(each): math.copysign(1, each.weight) for each in judges}
        self._rows: dict[int, Mapping[str, float]] = {}
        self._spreads: dict[int, Spreads] = {}
        self._evaluations: list[tuple[int, Mapping[str, Figure]]] = []
        self._active: set[tuple[str, str, str]] = set()

    def recall(self, output: RunDirectory, identity: Mapping[str, Any] | None) -> list[Alarm]:
        """Take up what a run has written, and return the alarms that its log lacks, for a crash came between."""
        spreads = {row["iteration"]: row.get("spread", {}) for row in output.rows(SPREAD)}
        found = []
        for row in output.rows(METRICS):
            found += self.look(row["iteration"], row, spreads.get(row["iteration"], {}))
        evaluations = [row for row in output.rows(EVALUATION) if row.get("identity") == identity]
        for row in sorted(evaluations, key=lambda row: int(row["iteration"])):
            figures = {label: Figure(**figure) for label, figure in row["figures"].items()}
            found += self.look_held_out(row["iteration"], figures)
        logged = {(row["iteration"], row.get("message")) for row in output.rows(ALARMS)}
        return [alarm for alarm in found if (alarm.iteration, alarm.message) not in logged]

    def look(self, iteration: int, row: Mapping[str, float], spreads: Spreads) -> list[Alarm]:
        """Take up an iteration's figures, and return the alarms that set in with it."""
        if not self.recipe.alarm.enabled:
            return []
        self._rows[iteration], self._spreads[iteration] = row, spreads
        if (iteration + 1) % self.recipe.alarm.window:
            return []
        rules = {
            "auxiliary": self._falling_auxiliary,
            "collapse": self._collapsed,
            "diversity": self._lost_diversity,
        }
        return [alarm for kind, rule in rules.items() for alarm in self._onsets(kind, rule(iteration + 1))]

    def look_held_out(self, done: int, figures: Mapping[str, Figure]) -> list[Alarm]:
        """Take up held-out figures after ``done`` iterations, and return the alarms that set in with them."""
        if not self.recipe.alarm.enabled:
            return []
        self._evaluations.append((done, figures))
        return self._onsets("held_out", self._falling_held_out())

    def _onsets(self, kind: str, alarms: Iterator[Alarm]) -> list[Alarm]:
        found = {alarm.key: alarm for alarm in alarms}
        onsets = [alarm for key, alarm in found.items() if key not in self._active]
        self._active = {key for key in self._active if key[0] != kind} | found.keys()
        return onsets

    def _level(self, look: int, comparisons: int) -> float:
        """Return the level of one of the ``comparisons`` of a kind's look, which are counted from 1."""
        return (1 - self.recipe.alarm.confidence) / (KINDS * look * (look + 1) * comparisons)

    def _falling_auxiliary(self, done: int) -> Iterator[Alarm]:
        """Compare trends over the last ``alarm.window`` iterations, twice as many, and so on."""
        window = self.recipe.alarm.window
        lengths = [window << i for i in range((done // window).bit_length())]
        pairs = list(product(self._trained, self._auxiliary))
        for (trained, label), length in product(pairs, lengths):
            level = self._level(done // window, len(pairs) * len(lengths))
            span = range(done - length, done)
            change = change_of(self._series(label, self._auxiliary, span))
            fall = _clear_fall(change, self._deviation(label, span), level)
            if fall is not None:
                yield from self._exploited("auxiliary", trained, label, span, fall, level)

    def _falling_held_out(self) -> Iterator[Alarm]:
        """Compare the last evaluation with each before, prompt by prompt."""
        *earlier, (done, figures) = self._evaluations
        if not earlier:
            return
        level = self._level(len(earlier), len(earlier) * len(self._held_out))
        for label, sign in self._held_out.items():
            first = earlier[0][1].get(label)
            deviation = (first.std if first is not None else None) or 0.0
            falls: dict[float, range] = {}
            for start, before in earlier:
                changes = _paired_changes(before.get(label), figures.get(label), sign)
                fall = _clear_fall(mean_of(changes), deviation, level, changes)
                if fall is not None:
                    falls[fall] = range(start, done)
            exploited = [
                alarm
                for (fall, span), trained in product(falls.items(), self._trained)
                for alarm in self._exploited("held_out", trained, label, span, fall, level)
            ]
            yield from exploited
            if falls and not exploited:
                fall, span = min(falls.items())
                spans = f"after {done} iterations than after {span.start}"
                yield _lost("held_out", f"the held-out reward '{label}'", spans, label, span, fall)

    def _exploited(
        self, kind: str, trained: str, label: str, span: range, fall: float, level: float
    ) -> Iterator[Alarm]:
        """Yield the alarm about a reward that has fallen, if a trained one has risen meanwhile."""
        rise = change_of(self._series(trained, self._trained, span))
        if rise is None or (-rise).probability_at(0.0) >= level:
            return
        other = {"auxiliary": "auxiliary", "held_out": "held-out"}[kind]
        message = (
            f"from iteration {span.start} to {span.stop - 1} the trained reward '{trained}' rose by {rise.value:.3g}, "
            f"and the {other} reward '{label}' fell by {-fall:.3g}: the policy may please the one at the "
            "expense of what is wanted; look at samples, and go back to an earlier checkpoint, give a weight to a "
            "reward that notices, lower optim.lr, or set loss.kl"
        )
        yield Alarm(span.stop - 1, kind, trained, label, span.start, fall, message)

    def _collapsed(self, done: int) -> Iterator[Alarm]:
        """Compare the last ``alarm.window`` iterations with those of earlier looks that had trees of the same plans."""
        window = self.recipe.alarm.window
        *earlier, last = (range(end - window, end) for end in range(window, done + 1, window))
        if not earlier:
            return
        level = self._level(len(earlier), len(earlier) * len(self._trained))
        for label in self._trained:
            late, deviation = self._series(label, self._trained, last), self._deviation(label, earlier[0])
            falls: dict[float, range] = {}
            for span in earlier:
                change = difference_of(late, self._series(label, self._trained, span))
                fall = _clear_fall(change, deviation, level)
                if fall is not None and self._alike(span, last):
                    falls[fall] = span
            if falls:
                fall, best = min(falls.items())
                spans = f"in iterations {last.start} to {last.stop - 1} than in {best.start} to {best.stop - 1}"
                span = range(best.start, last.stop)
                yield _lost("collapse", f"the trained reward '{label}'", spans, label, span, fall)

    def _alike(self, *spans: range) -> bool:
        """Whether most trees of either span have a plan that recurs in the other: noise elsewhere changes rewards."""
        one, other = (self._trees(span) for span in spans)
        return all(
            sum(trees[plan] for plan in others) >= LEAST_ALIKE * trees.total()
            for trees, others in ((one, other), (other, one))
        )

    def _trees(self, span: range) -> Counter[str]:
        """Return how many trees have each plan."""
        found: Counter[str] = Counter()
        for iteration in span:
            found.update({plan: len(spreads) for plan, spreads in self._spreads.get(iteration, {}).items()})
        return found

    def _lost_diversity(self, done: int) -> Iterator[Alarm]:
        """Compare the last ``alarm.window`` iterations with the first, among trees of the same plan."""
        window = self.recipe.alarm.window
        looks = done // window - 1
        if looks < 1:
            return
        observed = [
            (math.log(max(spread, SMALLEST)), iteration >= window, plan)
            for iteration in (*range(window), *range(done - window, done))
            for plan, spreads in self._spreads.get(iteration, {}).items()
            for spread in spreads
        ]
        if not observed:
            return
        values, late, plans = zip(*observed, strict=True)
        index = {plan: i for i, plan in enumerate(dict.fromkeys(plans))}
        stratum = torch.tensor([index[plan] for plan in plans])
        ratio = contrast_of(torch.tensor(values, dtype=torch.float64), torch.tensor(late), stratum, len(index))
        if ratio is None or ratio.probability_at(math.log(LEAST_DIVERSITY)) >= self._level(looks, 1):
            return
        message = (
            f"the samples of a prompt lie {math.exp(ratio.value):.2g} times as far apart in iterations "
            f"{done - window} to {done - 1} as in the first {window}: the policy loses its diversity; go back to an "
            "earlier checkpoint, lower optim.lr, set loss.kl, or train a reward of diversity too"
        )
        yield Alarm(done - 1, "diversity", "", "", 0, math.exp(ratio.value), message)

    def _series(self, label: str, signs: Mapping[str, float], span: range) -> list[float | None]:
        """Return a reward's mean in each iteration, such that larger is better."""
        means = [self._rows.get(iteration, {}).get(f"reward/{label}/mean") for iteration in span]
        return [None if mean is None else signs[label] * mean for mean in means]

    def _deviation(self, label: str, span: range) -> float:
        """Return a reward's deviation within a prompt, averaged over iterations."""
        known = [self._rows[i][name] for i in span if (name := f"reward/{label}/std") in self._rows.get(i, {})]
        return sum(known) / len(known) if known else 0.0


def write_alarms(output: RunDirectory, alarms: Sequence[Alarm]) -> None:
    """Log alarms as warnings and write them down."""
    for alarm in alarms:
        output.append(ALARMS, asdict(alarm))
        log.warning("alarm: %s", alarm.message)


def spreads_by_plan(plans: Sequence[TreePlan], spreads: Sequence[float | None]) -> dict[str, list[float]]:
    """Group the spreads of an iteration's prompts, or none, by what their trees' plans have in common.

    Where trees split and how noisy their steps are decides how far apart leaves lie: only like is compared with like.
    """
    found: dict[str, list[float]] = {}
    for plan, spread in zip(plans, spreads, strict=False):
        if spread is not None:
            described = repr(replace(plan, fraction=None)).encode()
            found.setdefault(hashlib.blake2b(described, digest_size=4).hexdigest(), []).append(spread)
    return found


def _clear_fall(
    change: Estimate | None, deviation: float, level: float, differences: Sequence[float] | None = None
) -> float | None:
    """Return a change that is a fall worth a word, and less probable than ``level`` if the truth is none; else None.

    A mean of paired ``differences`` is also tested by their ranks, each test at half the level.
    """
    if change is None or change.value >= -LEAST_FALL * deviation:
        return None
    probability = change.probability_at(0.0)
    if differences is not None:
        probability = 2 * min(probability, signed_rank_tail(differences))
    return change.value if probability < level else None


def _lost(kind: str, subject: str, spans: str, label: str, span: range, fall: float) -> Alarm:
    """Return the alarm that a reward has fallen though none has risen."""
    message = (
        f"{subject} was lower by {-fall:.3g} {spans}: the policy gets worse; go back to an earlier checkpoint, and "
        "lower optim.lr or set loss.kl"
    )
    return Alarm(span.stop - 1, kind, "", label, span.start, fall, message)


def _paired_changes(before: Figure | None, after: Figure | None, sign: float) -> list[float]:
    """Return how far each prompt's mean rose, the same prompts and noises having been sampled."""
    if before is None or after is None or before.prompts is None or after.prompts is None:
        return []
    pairs = zip(before.prompts, after.prompts, strict=True)
    return [sign * (late - early) for early, late in pairs if early is not None and late is not None]


def _label(section: RewardSection) -> str:
    return section.label or section.reward
