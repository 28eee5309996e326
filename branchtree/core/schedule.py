"""Which steps split, which are stochastic, which are trained: one static plan per prompt and iteration.

A plan fixes a tree's whole shape before anything is sampled. T is the number of transitions; transition i
goes from depth i to depth i + 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable


@dataclass(frozen=True)
class TimestepFraction:
    """A random fraction of a trajectory's trained steps (DanceGRPO's timestep fraction, arXiv 2505.07818).

    Drawn for each leaf separately, from an address that depends on the seed, iteration and prompt alone.
    """

    fraction: float
    address: str

    def steps(self, leaf: int, steps: Sequence[int]) -> list[int]:
        """Return those of the trained ``steps`` that the trajectory to this leaf trains, their number rounded down."""
        return random.Random(f"{self.address} {leaf}").sample(steps, int(self.fraction * len(steps)))


@dataclass(frozen=True)
class TreePlan:
    """The shape of one prompt's tree.

    factors[i] is the number of children that each node of depth i gets; stochastic[i] says whether
    transition i is an SDE step; trained[i] whether its edges may be trained. The last transition is always
    deterministic: its result is the clean estimate, which is what gets decoded and scored (BranchGRPO,
    arXiv 2509.06040, "ignore last step").

    A skipped step is not evaluated: the evaluated step before it leads straight to the depth after it, so that the rest
    of a trajectory can be walked in fewer, longer steps, and several steps can be joined into one stochastic step.
    Where the first steps are skipped, the trajectory begins at a deeper one. Of the trained steps a trajectory may
    train a random fraction. With ``still``, the first child of each split takes the deterministic step: it is scored,
    to compare its siblings with, and never trained.
    """

    factors: tuple[int, ...]  # (T,)
    stochastic: tuple[bool, ...]  # (T,)
    trained: tuple[bool, ...]  # (T,)
    skipped: frozenset[int] = frozenset()  # steps that are not evaluated
    fraction: TimestepFraction | None = None  # of the trained steps, by trajectory; all by default
    noise: tuple[float, ...] = ()  # (T,) each step's noise over the kernel's own; empty where all have that
    still: bool = False

    def __post_init__(self) -> None:
        if not len(self.factors) == len(self.stochastic) == len(self.trained) > 0:
            raise ValueError("factors, stochastic and trained must have one entry per step, and at least one")
        if self.stochastic[-1]:
            raise ValueError("the last step is deterministic")
        for step, factor in enumerate(self.factors):
            if factor < 1:
                raise ValueError(f"step {step} gives each node {factor} children; at least 1 is needed")
            if factor > 1 and not self.stochastic[step]:
                raise ValueError(f"step {step} splits, so it must be stochastic")
            if self.trained[step] and not self.stochastic[step]:
                raise ValueError(f"step {step} is deterministic, so it cannot be trained")
            if step in self.skipped and self.stochastic[step]:
                raise ValueError(f"step {step} cannot be skipped: it is stochastic")
        if any(flag and target == self.steps for flag, target in zip(self.stochastic, self.target, strict=True)):
            raise ValueError("a stochastic step cannot be joined with the last step, which is deterministic")
        if self.noise and not (len(self.noise) == self.steps and all(0 < each < math.inf for each in self.noise)):
            raise ValueError(f"noise is a positive factor for each of {self.steps} steps, not {self.noise}")

    @property
    def steps(self) -> int:
        """T, the number of transitions."""
        return len(self.factors)

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """The steps at which nodes get more than one child."""
        return tuple(step for step, factor in enumerate(self.factors) if factor > 1)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Nodes at each depth, (T + 1,)."""
        return tuple(math.prod(self.factors[:depth]) for depth in range(self.steps + 1))

    @property
    def leaves(self) -> int:
        """Nodes at depth T."""
        return self.widths[-1]

    @property
    def last_stochastic(self) -> int:
        """The last SDE step, or -1 in a deterministic tree."""
        return last_true(self.stochastic)

    @cached_property
    def target(self) -> tuple[int, ...]:
        """The depth that each step leads to, (T,): the next, or beyond skipped steps."""
        depths = [self.steps] * self.steps
        for step in range(self.steps - 2, -1, -1):
            depths[step] = depths[step + 1] if step + 1 in self.skipped else step + 1
        return tuple(depths)

    def evaluated(self, depth: int) -> int:
        """Return how many nodes of a depth go through the denoiser."""
        return 0 if depth in self.skipped else self.widths[depth]

    def active(self, step: int) -> float:
        """Return a step's noise over the kernel's own; a bool where it is all of it, or none."""
        return self.stochastic[step] and (self.noise[step] if self.noise else True)

    @property
    def last_split(self) -> int:
        """The last step that splits, or -1 in a tree that never does."""
        return self.splits[-1] if self.splits else -1


@dataclass(frozen=True)
class SlidingWindow:
    """A window of ``size`` steps whose first step starts at ``start`` and moves one deeper every ``every`` iterations.

    It stops moving when its first step reaches ``stop``.
    """

    size: int
    start: int
    every: int
    stop: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.every < 1 or self.start < 0 or self.stop < self.start:
            raise ValueError(
                f"not a window: size {self.size}, start {self.start}, every {self.every}, stop {self.stop}"
            )

    def steps(self, iteration: int) -> range:
        """The steps inside the window at this training iteration."""
        first = min(self.start + iteration // self.every, self.stop)
        return range(first, first + self.size)


@dataclass(frozen=True)
class SplitAtWindow:
    """One split, at the first step of a sliding window: a shared deterministic prefix (MixGRPO, arXiv 2507.21802)."""

    window: SlidingWindow
    branches: int

    def factors(self, iteration: int, prompt: int) -> dict[int, int]:
        """See Splits."""
        return {self.window.steps(iteration).start: self.branches}

    def possible(self, iteration: int) -> list[dict[int, int]]:
        """See ListsSplits."""
        return [self.factors(iteration, 0)]


class Splits(Protocol):
    """Chooses where one prompt's tree splits."""

    def factors(self, iteration: int, prompt: int) -> dict[int, int]:
        """The split steps of this prompt at this iteration, each with its branch factor."""


@runtime_checkable
class ListsSplits(Protocol):
    """Splits that know all that can be drawn, if anything is."""

    def possible(self, iteration: int) -> list[dict[int, int]]:
        """What ``factors`` may give at this iteration, each as likely as the others."""


@dataclass(frozen=True)
class Branching:
    """Where one prompt's tree splits, and with what noise."""

    factors: Mapping[int, int]  # children by split step
    noise: Mapping[int, float] = field(default_factory=dict)  # by split step, over the kernel's own; 1 by default
    still: bool = False  # as in TreePlan


@runtime_checkable
class ChoosesNoise(Protocol):
    """A rule of splits that chooses their noise too."""

    def branching(self, iteration: int, prompt: int) -> Branching:
        """Return the splits of this prompt at this iteration, with their noise."""


@dataclass(frozen=True)
class FixedSplits:
    """The same split steps for every prompt and iteration."""

    steps: tuple[int, ...]
    branches: tuple[int, ...]  # one factor per split step

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.branches):
            raise ValueError(f"{len(self.steps)} split steps need as many branch factors, not {len(self.branches)}")
        if len(set(self.steps)) != len(self.steps):
            raise ValueError(f"a step splits once, so {self.steps} cannot repeat one")

    def factors(self, iteration: int, prompt: int) -> dict[int, int]:
        """See Splits."""
        return dict(zip(self.steps, self.branches, strict=True))

    def possible(self, iteration: int) -> list[dict[int, int]]:
        """See ListsSplits."""
        return [self.factors(iteration, 0)]


@dataclass(frozen=True)
class DrawnSplits:
    """One split step per prompt and iteration, drawn evenly from ``first`` to ``last`` inclusive.

    With every other step deterministic the reward difference between siblings is the credit of exactly the
    drawn step. The draw depends on (seed, iteration, prompt) alone.
    """

    first: int
    last: int
    branches: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"a split cannot be drawn from step {self.first} to step {self.last}")

    def factors(self, iteration: int, prompt: int) -> dict[int, int]:
        """See Splits."""
        draw = random.Random(f"split {self.seed} {iteration} {prompt}")  # string seeds do not depend on the process
        return {draw.randint(self.first, self.last): self.branches}

    def possible(self, iteration: int) -> list[dict[int, int]]:
        """See ListsSplits."""
        return [{step: self.branches} for step in range(self.first, self.last + 1)]


@dataclass(frozen=True)
class Schedule:
    """Makes the plan of each prompt's tree at each iteration.

    ``sde`` says which steps are stochastic beside the split steps: ``"all"`` of them, ``"splits"`` (no
    others), or those inside a SlidingWindow (BranchGRPO's hybrid ODE-SDE, "Mix").

    ``noise`` has the noise of each split over the kernel's own, in order; a stochastic step between splits takes that
    of the last split before it, and one before all splits that of the first. ``join`` is how many of the grid's steps
    the stochastic step at a split takes as one, for all splits or for each; no further than the last step.
    """

    steps: int
    splits: Splits
    sde: Literal["all", "splits"] | SlidingWindow = "all"
    continuation: int | None = None  # steps that remain after the last stochastic one; all of the grid's by default
    fraction: float = 1.0  # of the stochastic steps, that each trajectory trains
    seed: int = 0  # of the drawn fraction
    noise: tuple[float, ...] = ()
    join: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if self.continuation is not None and self.continuation < 1:
            raise ValueError(f"a continuation needs at least 1 step, not {self.continuation}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"a fraction of the steps is trained, above 0 and up to 1, not {self.fraction}")
        if not isinstance(self.sde, SlidingWindow) and self.sde not in {"all", "splits"}:
            raise ValueError(f"sde is 'all', 'splits' or a window, not {self.sde!r}")

    def plan(self, iteration: int, prompt: int) -> TreePlan:
        """The plan for one prompt. Raises ValueError if a split step lies outside the grid."""
        rule = self.splits
        chosen = rule.branching if isinstance(rule, ChoosesNoise) else None
        branching = chosen(iteration, prompt) if chosen else Branching(rule.factors(iteration, prompt))
        return self.shaped(branching, iteration, prompt)

    def possible_plans(self, iteration: int, prompts: int) -> list[TreePlan]:
        """Return the plans that prompts can have at an iteration, each as likely as the others.

        They are those of the first ``prompts`` prompts where the rule of the splits does not list what it can draw.
        """
        if isinstance(self.splits, ListsSplits):
            return [self.shaped(Branching(factors), iteration, 0) for factors in self.splits.possible(iteration)]
        return [self.plan(iteration, prompt) for prompt in range(prompts)]

    def shaped(self, branching: Branching, iteration: int, prompt: int) -> TreePlan:
        """Return the plan for one prompt that splits as given. Raises ValueError as ``plan`` does."""
        factors = branching.factors
        for step, factor in factors.items():
            if not 0 <= step < self.steps - 1:
                raise ValueError(
                    f"split step {step} lies outside the grid: with {self.steps} steps the steps 0 to "
                    f"{self.steps - 2} can split (the last one is deterministic)"
                )
            if factor < 2:
                raise ValueError(f"split step {step} has branch factor {factor}; a split needs at least 2")
        inside, joined = self._sde_steps(iteration), self._joined(sorted(factors))
        stochastic = tuple(
            step < self.steps - 1 and step not in joined and (step in factors or step in inside)
            for step in range(self.steps)
        )
        first = last_true(stochastic) + 1  # after the last stochastic step
        while first in joined:
            first += 1
        fraction = (
            None if self.fraction == 1 else TimestepFraction(self.fraction, f"part {self.seed} {iteration} {prompt}")
        )
        return TreePlan(
            factors=tuple(factors.get(step, 1) for step in range(self.steps)),
            stochastic=stochastic,
            trained=stochastic,
            skipped=joined | skipped_steps(first, self.steps, self.continuation),
            fraction=fraction,
            noise=self._noise(branching),
            still=branching.still,
        )

    def _joined(self, splits: Sequence[int]) -> frozenset[int]:
        """Return the steps that are taken together with a split before them."""
        lengths = (self.join,) * len(splits) if isinstance(self.join, int) else self.join
        if len(lengths) != len(splits):
            raise ValueError(f"{len(splits)} splits need as many lengths of joined steps, not {len(lengths)}")
        joined = [
            step for split, length in zip(splits, lengths, strict=True) for step in range(split + 1, split + length)
        ]
        if crossed := set(joined).intersection(splits):
            raise ValueError(f"joined steps reach beyond the split at step {min(crossed)}")
        return frozenset(step for step in joined if step < self.steps - 1)

    def _noise(self, branching: Branching) -> tuple[float, ...]:
        """Return the noise of each step over the kernel's own, (T,); none where no split has one of its own."""
        splits = sorted(branching.factors)
        if self.noise and len(self.noise) != len(splits):
            raise ValueError(f"{len(splits)} splits need as many noise levels, not {len(self.noise)}")
        if not splits or not (self.noise or branching.noise):
            return ()
        levels = self.noise or [branching.noise.get(step, 1.0) for step in splits]
        before = [max(sum(split <= step for split in splits) - 1, 0) for step in range(self.steps)]
        return tuple(levels[i] for i in before)

    def _sde_steps(self, iteration: int) -> range:
        if isinstance(self.sde, SlidingWindow):
            return self.sde.steps(iteration)
        return range(self.steps) if self.sde == "all" else range(0)


def last_true(flags: Sequence[bool]) -> int:
    """Return the index of the last flag that is set, or -1."""
    return max((i for i, flag in enumerate(flags) if flag), default=-1)


def skipped_steps(first: int, steps: int, kept: int | None) -> frozenset[int]:
    """Return which of the steps from ``first`` on are left out so that ``kept`` remain, spread evenly over the grid.

    The first of them is always kept. None, or as many as there are, leaves out none.
    """
    count = steps - first
    if kept is None or kept >= count:
        return frozenset()
    remaining = {first + i * count // kept for i in range(kept)}
    return frozenset(range(first, steps)) - remaining


PRESET_SPLITS: dict[str, tuple[int, ...]] = {
    "dense": (0, 3, 6, 9),
    "mixed": (0, 4, 8, 12),
    "sparse": (0, 5, 10, 15),
}
"""Split steps of the paper's three presets, for T = 20 and K = 2."""
