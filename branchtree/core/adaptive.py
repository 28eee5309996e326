"""Splits that follow from what iterations showed: where, how wide, for which prompts, and with how much noise.

A tree splits once, every other step being deterministic, so that siblings differ by the noise of one step alone. Of
each split the rewards of the siblings, and of one that takes the deterministic step, are remembered in a table. The
next iteration's splits depend on the table, the seed, the iteration and its prompts, and on nothing else.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from branchtree.core.cost import GRADIENT_COST
from branchtree.core.fusion import TIE, NodeValues
from branchtree.core.schedule import Branching, Schedule, TreePlan
from branchtree.core.tree import Topology

State = Mapping[str, Any]
"""What a rule remembers: what JSON can hold, with strings for keys."""

PRIOR = 2.0
"""Observations for which the mean over all steps, or prompts, counts in the estimate of one."""
START_WEIGHT, WEIGHT_OF_TREE, MOST_WEIGHT = 25.0, 0.5, 200.0
"""How many trees the means of the noise and of the drop stand for, at first, more with each tree, and at the most.

The first are forgotten with the square of the number, since what is far from the answer says little about it. The most
is large because a drop is small beside the spread.
"""
RECENT, LONG, ERRORS = 100, 1000, 3.0
"""Trees over which the deterministic siblings' mean reward goes back, trees that the best such mean is remembered for,
and the standard errors below it from which the policy is taken to have got worse."""
CLEAR = 2.0
"""Standard errors from which a mean ratio is taken to be negative, or, as far as trees tie, to be positive."""
LEAST_CHANGE, MOST_CHANGE = 0.5, 2.0
"""Bounds of the noise over the mean of that which was tried."""
WIDEST = 1e4
"""The largest and, inverted, the least noise over the kernel's own."""


@runtime_checkable
class LearnsSplits(Protocol):
    """A rule of splits that learns from scored trees. Its state is kept in checkpoints, and alike on all processes."""

    def start(self) -> State:
        """Return the state before the first iteration."""

    def choose(self, state: State, iteration: int, prompts: Sequence[int], indices: Sequence[int]) -> list[Branching]:
        """Return how the trees of an iteration's prompts split, over all processes.

        ``prompts`` are their addresses for draws, which never repeat, and ``indices`` say which of the data they are.
        """

    def observe(
        self,
        state: State,
        indices: Sequence[int],
        topology: Topology,
        values: Mapping[str, NodeValues],
        weights: Mapping[str, float],
    ) -> State:
        """Return the state after an iteration; change nothing.

        Its trees, over all processes, have these values by each reward that has a weight, and these are the weights.
        """


def plan_learned(
    schedule: Schedule, state: State, iteration: int, prompts: Sequence[int], indices: Sequence[int], most: float
) -> list[TreePlan]:
    """Return the plans of an iteration's prompts under a rule that learns; no noise is above ``most`` of the kernel's.

    Raises ValueError if the schedule's rule does not learn, or chooses what cannot be.
    """
    rule = schedule.splits
    if not isinstance(rule, LearnsSplits):
        raise ValueError(f"{type(rule).__name__} does not learn")
    chosen = rule.choose(state, iteration, prompts, indices)
    limited = [
        Branching(each.factors, {step: min(noise, most) for step, noise in each.noise.items()}, each.still)
        for each in chosen
    ]
    return [schedule.shaped(each, iteration, prompt) for each, prompt in zip(limited, prompts, strict=True)]


def plan_ahead(schedule: Schedule, iteration: int, prompts: Sequence[int]) -> list[TreePlan]:
    """Return the plans of an iteration's prompts, under a rule that learns as before it has learnt anything."""
    rule = schedule.splits
    if isinstance(rule, LearnsSplits):
        return plan_learned(schedule, rule.start(), iteration, prompts, prompts, math.inf)
    return [schedule.plan(iteration, prompt) for prompt in prompts]


@dataclass(frozen=True)
class SplitRewards:
    """What one reward says of the children of one split."""

    noisy: Tensor  # (K,) float64, the stochastic ones' rewards, two at the least
    still: float | None  # the deterministic one's
    rounding: float  # of the rewards

    @property
    def spread(self) -> float:
        """The sample deviation of the stochastic ones' rewards; 0 where they differ by rounding alone."""
        spread = float(self.noisy.std())
        return spread if spread > self.rounding else 0.0

    @property
    def standardised(self) -> tuple[Tensor, float]:
        """Rewards (K,) of mean 0 and deviation 1, and the deterministic one's on their scale; 0 without one.

        Where the stochastic ones tie all are 0, and the deterministic one is -1 or 1 if it does not tie with them.
        """
        mean, spread = float(self.noisy.mean()), self.spread
        drop = 0.0 if self.still is None else self.still - mean
        if spread == 0:
            return torch.zeros_like(self.noisy), math.copysign(1.0, drop) if abs(drop) > self.rounding else 0.0
        return (self.noisy - mean) / spread, drop / spread


@dataclass(frozen=True)
class Outcome:
    """What the siblings of one split showed."""

    step: int
    rewards: Mapping[str, SplitRewards]  # by each reward that has a weight
    weights: Mapping[str, float]

    @property
    def tied(self) -> bool:
        """Whether no reward tells the stochastic siblings apart."""
        return all(each.spread == 0 for each in self.rewards.values())

    @property
    def ratio(self) -> float | None:
        """The drop over the spread, -1 to 1, of the weighted sum of standardised rewards; None without a drop.

        The drop is the deterministic sibling's reward less the stochastic ones' mean. Where the stochastic siblings
        tie it is 0 if the deterministic one ties with them, and else -1 or 1.
        """
        if any(each.still is None for each in self.rewards.values()):
            return None
        pairs = [(self.weights[name], *each.standardised) for name, each in self.rewards.items()]
        spread = float(torch.stack([weight * noisy for weight, noisy, _ in pairs]).sum(dim=0).std())
        drop = sum(weight * still for weight, _, still in pairs)
        rounding = TIE * sum(abs(weight) for weight in self.weights.values())
        if spread <= rounding:
            return 0.0 if abs(drop) <= rounding else math.copysign(1.0, drop)
        return min(max(drop / spread, -1.0), 1.0)


@dataclass(frozen=True)
class AdaptiveSplits:
    """One split per prompt, at the step where siblings spread most per row, its children a share of a row budget.

    The step is that whose siblings have the largest mean spread over the rows of such a tree; the fraction ``explore``
    of the splits is drawn evenly instead. Children are shared out by Neyman's allocation with costs: in proportion
    to the spread expected of the prompt and step, over the root of the rows that a child takes. The noise, the same
    factor for all steps, is that at which the siblings' mean should lie ``drop`` of their spread below their
    deterministic sibling; see docs/methods/adaptive.md.
    """

    steps: tuple[int, ...]  # that may split
    remaining: tuple[int, ...]  # predictions from each of them to a leaf, the split's own left out
    branches: int  # children of a split, on average
    most: int  # children of a split, at most
    seed: int
    explore: float = 0.25
    memory: int = 40  # observations over which an estimate goes back
    drop: float | None = 0.05  # None leaves the noise as it is
    by_prompt: bool = True
    rows: int | None = None  # predictions of an iteration's rollouts; by default see ``budget``

    @property
    def least(self) -> int:
        """Children of a split, at least."""
        return 2 if self.drop is None else 3

    def budget(self, prompts: int) -> int:
        """Return the most predictions that the rollouts of an iteration take.

        By default they are those of ``branches`` children at the cheapest step, or of the fewest at the dearest. What a
        late split saves is left to more iterations, which are worth more than more children.
        """
        if self.rows is not None:
            return self.rows
        steps = list(zip(self.steps, self.remaining, strict=True))
        cheapest = min(step + 1 + self.branches * below for step, below in steps)
        return prompts * max(cheapest, *(step + 1 + self.least * below for step, below in steps))

    def factors(self, iteration: int, prompt: int) -> dict[int, int]:
        """See Splits; as before anything is learnt."""
        return {self._draw(self.start(), iteration, prompt): self.branches}

    def branching(self, iteration: int, prompt: int) -> Branching:
        """See ChoosesNoise; as before anything is learnt."""
        return Branching(self.factors(iteration, prompt), still=self.drop is not None)

    def start(self) -> State:
        """See LearnsSplits."""
        noise = {"log": 0.0, "ratio": self.drop or 0.0, "square": 0.0, "weight": START_WEIGHT}
        return {"rewards": {}, "prompts": {}, "ties": {"mean": 0.0, "weight": 0.0}, "noise": noise}

    def _start(self) -> dict[str, Any]:
        """Return what is remembered of one reward, before it has said anything."""
        return {
            "weight": 1.0,
            "steps": {str(each): {"mean": 0.0, "weight": 0.0} for each in self.steps},
            "still": {"mean": 0.0, "variance": 0.0, "weight": 0.0, "best": None},
        }

    def choose(self, state: State, iteration: int, prompts: Sequence[int], indices: Sequence[int]) -> list[Branching]:
        """See LearnsSplits."""
        steps = [self._draw(state, iteration, prompt) for prompt in prompts]
        spread, below = self.spreads(state), dict(zip(self.steps, self.remaining, strict=True))
        wanted = [
            spread[step] * self.relative(state, index) / math.sqrt(below[step])
            for step, index in zip(steps, indices, strict=True)
        ]
        rows = self.budget(len(prompts)) - sum(step + 1 for step in steps)
        children = allocate(wanted, [below[step] for step in steps], self.least, self.most, rows)
        noise = self.noise(state)
        return [
            Branching({step: count}, {} if noise is None else {step: noise}, still=noise is not None)
            for step, count in zip(steps, children, strict=True)
        ]

    def noise(self, state: State) -> float | None:
        """Return the next splits' noise over the kernel's own; None where it is left as it is.

        The drop is proportional to the noise, in units of the spread. So the noise that was tried, on average, is
        scaled by the ratio that is wanted over the ratio that is shown. A policy that has adapted to much noise is not
        worse for it, but worse without it: then the ratio is negative, or the deterministic siblings get worse.
        """
        if self.drop is None:
            return None
        tried, seen = math.exp(state["noise"]["log"]), _shown(state["noise"], state["ties"]["mean"])
        most = 1.0 if _got_worse(state["rewards"].values()) else MOST_CHANGE
        change = min(self.drop / seen, most) if seen > 0 else most
        return min(max(tried * max(change, LEAST_CHANGE), 1 / WIDEST), WIDEST)

    def spreads(self, state: State) -> dict[int, float]:
        """Return the siblings' spread expected at each step over that of all steps, for equal noise.

        It is the mean of all rewards, by their weights; 1 for all before anything was seen, and 0 where all tie.
        """
        if not state["rewards"]:
            return dict.fromkeys(self.steps, 1.0)
        expected = {name: self._expected(entry) for name, entry in state["rewards"].items()}
        return {
            step: self._together(state, {name: each[step] for name, each in expected.items()}) for step in self.steps
        }

    def _expected(self, entry: Mapping[str, Any]) -> dict[int, float]:
        """Return the spread of a reward that is expected at each step, for noise of 1."""
        mean = _overall(entry["steps"])
        return {step: _shrunk(entry["steps"][str(step)], mean) for step in self.steps}

    def _together(self, state: State, spreads: Mapping[str, float]) -> float:
        """Return the rewards' spreads as one: each over that of all steps, and of these their mean by weight."""
        entries = [(state["rewards"][name], spread) for name, spread in spreads.items()]
        relative = [
            entry["weight"] * spread / mean for entry, spread in entries if (mean := _overall(entry["steps"])) > 0
        ]
        return float(sum(relative) / sum(entry["weight"] for entry, _ in entries))

    def relative(self, state: State, index: int) -> float:
        """Return the spread expected of a prompt of the data over that of all."""
        entry = state["prompts"].get(str(index))
        return 1.0 if entry is None or not self.by_prompt else _shrunk(entry, 1.0)

    def chances(self, state: State) -> list[float]:
        """Return each step's probability: all but ``explore`` goes to the step of most spread for its rows."""
        spread = self.spreads(state)
        useful = [
            spread[step] / (step + 1 + self.branches * below + GRADIENT_COST)
            for step, below in zip(self.steps, self.remaining, strict=True)
        ]
        if not state["rewards"] or max(useful) == 0:
            return [1 / len(self.steps)] * len(self.steps)
        best, even = useful.index(max(useful)), self.explore / len(self.steps)
        return [even + (1 - self.explore) * (i == best) for i in range(len(self.steps))]

    def _draw(self, state: State, iteration: int, prompt: int) -> int:
        draw = random.Random(f"adaptive {self.seed} {iteration} {prompt}")  # string seeds do not depend on the process
        return draw.choices(self.steps, self.chances(state))[0]

    def observe(
        self,
        state: State,
        indices: Sequence[int],
        topology: Topology,
        values: Mapping[str, NodeValues],
        weights: Mapping[str, float],
    ) -> State:
        """See LearnsSplits."""
        outcomes = ((i, observed(topology, values, weights, i)) for i in range(topology.prompts))
        seen = [(i, outcome) for i, outcome in outcomes if outcome is not None]
        if not seen:
            return state
        after = copy.deepcopy(dict(state))
        after["rewards"] = {
            name: after["rewards"].get(name, self._start()) | {"weight": abs(weights[name])} for name in values
        }
        spreads = list[dict[str, float]]()
        for i, outcome in seen:
            # Without the division the steps that are drawn while there is much noise would seem best.
            noise = float(topology.plans[i].active(outcome.step))
            spreads.append({name: each.spread / noise for name, each in outcome.rewards.items()})
            for name, each in outcome.rewards.items():
                table = after["rewards"][name]
                _remember(table["steps"][str(outcome.step)], spreads[-1][name], self.memory)
                if each.still is not None:
                    _follow(table["still"], math.copysign(1.0, weights[name]) * each.still)
            _remember(after["ties"], float(outcome.tied), self.memory)
            if (ratio := outcome.ratio) is not None:
                _learn(after["noise"], math.log(noise), ratio)
        known = state if state["rewards"].keys() == values.keys() else after
        expected = self.spreads(known)
        for (i, outcome), spread in zip(seen, spreads, strict=True):
            if self.by_prompt and expected[outcome.step] > 0:
                entry = after["prompts"].setdefault(str(indices[i]), {"mean": 0.0, "weight": 0.0})
                _remember(entry, self._together(known, spread) / expected[outcome.step], self.memory)
        return after


def observed(
    topology: Topology, values: Mapping[str, NodeValues], weights: Mapping[str, float], prompt: int
) -> Outcome | None:
    """Return what a prompt's tree showed that splits once; None where fewer than two siblings can be compared."""
    plan = topology.plans[prompt]
    leaves, first = topology.span(prompt, topology.steps), int(plan.still)
    rewards = {}
    for name, levels in values.items():
        value, valid = (level[-1][leaves.start : leaves.stop] for level in (levels.value, levels.valid))
        noisy, still = value[first:][valid[first:]], value[:first][valid[:first]]
        if noisy.numel() < 2:
            return None
        rounding = float(levels.rounding(topology)[prompt])
        rewards[name] = SplitRewards(noisy, float(still) if still.numel() else None, rounding)
    return Outcome(plan.last_split, rewards, weights)


def allocate(wanted: Sequence[float], rows: Sequence[int], least: int, most: int, budget: int) -> list[int]:
    """Share a budget of rows out: children in proportion to what is ``wanted``, from ``least`` to ``most`` each.

    A child takes ``rows`` of the budget. Nobody gets fewer than ``least``, whatever the budget; within it no more can
    be given out to anybody. Where nothing is wanted all want the same.
    """
    weights = wanted if sum(wanted) > 0 else [1.0] * len(wanted)

    def filled(level: float) -> list[float]:
        return [min(max(level * weight, least), most) for weight in weights]

    low, high = 0.0, most / min(weight for weight in weights if weight > 0)
    for _ in range(64):  # as close as float64 allows
        level = (low + high) / 2
        fits = sum(count * each for count, each in zip(filled(level), rows, strict=True)) <= budget
        low, high = (level, high) if fits else (low, level)
    exact = filled(low)
    counts = [math.floor(count) for count in exact]
    left = budget - sum(count * each for count, each in zip(counts, rows, strict=True))
    # The largest remainders first; then whoever has least of what it wants.
    while takers := [i for i, each in enumerate(rows) if counts[i] < most and each <= left and weights[i] > 0]:
        chosen = max(takers, key=lambda i: (exact[i] - counts[i], weights[i] / (counts[i] + 1), -i))
        counts[chosen] += 1
        left -= rows[chosen]
    return counts


def _overall(steps: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean over all observations at any step; 0 without one."""
    weight = sum(each["weight"] for each in steps.values())
    return sum(each["weight"] * each["mean"] for each in steps.values()) / weight if weight else 0.0


def _shrunk(entry: Mapping[str, float], prior: float) -> float:
    """Return an entry's mean, drawn towards a prior while there are few observations."""
    return (PRIOR * prior + entry["weight"] * entry["mean"]) / (PRIOR + entry["weight"])


def _remember(entry: dict[str, float], value: float, memory: int) -> None:
    """Add an observation to a mean that forgets."""
    entry["weight"] = entry["weight"] * (1 - 1 / memory) + 1
    entry["mean"] += (value - entry["mean"]) / entry["weight"]


def _learn(entry: dict[str, float], log: float, ratio: float) -> None:
    """Add the log noise of a tree, and what it did, to their means."""
    entry["weight"] = min(entry["weight"] + WEIGHT_OF_TREE, MOST_WEIGHT)
    entry["log"] += (log - entry["log"]) / entry["weight"]
    entry["ratio"] += (ratio - entry["ratio"]) / entry["weight"]
    entry["square"] += (ratio**2 - entry["square"]) / entry["weight"]


def _shown(entry: Mapping[str, float], ties: float) -> float:
    """Return the mean ratio, less its error as far as trees tie; its size, where it is clearly negative.

    Where most trees tie there is too little noise, and the mean is made by the few that do not.
    """
    ratio = entry["ratio"]
    error = CLEAR * math.sqrt(max(entry["square"] - ratio**2, 0.0) / (2 * entry["weight"]))
    return (abs(ratio) if ratio < -error else ratio) - ties * error


def _follow(entry: dict[str, Any], reward: float) -> None:
    """Add a deterministic sibling's reward to their mean and variance, and the mean to the best one so far."""
    entry["weight"] = min(entry["weight"] + 1, RECENT)
    share, change = 1 / entry["weight"], reward - entry["mean"]
    entry["mean"] += share * change
    entry["variance"] += share * ((1 - share) * change**2 - entry["variance"])
    if entry["weight"] == RECENT:
        best = entry["mean"] if entry["best"] is None else entry["best"]
        entry["best"] = max(entry["mean"], best + (entry["mean"] - best) / LONG)


def _got_worse(rewards: Collection[Mapping[str, Any]]) -> bool:
    """Return whether the deterministic siblings have fallen below the best that they were, by more than the error.

    Of several rewards it is the sum of falls over deviations, by weight, whose error is that of independent rewards.
    """
    if not rewards or any(entry["still"]["best"] is None for entry in rewards):
        return False
    fall = sum(entry["weight"] * _fall(entry["still"]) for entry in rewards)
    return bool(fall > ERRORS * math.hypot(*(entry["weight"] for entry in rewards)))


def _fall(entry: Mapping[str, float]) -> float:
    """Return by how many standard errors the mean is below the best."""
    error = math.sqrt(entry["variance"] / RECENT)
    return (entry["best"] - entry["mean"]) / error if error > 0 else 0.0
