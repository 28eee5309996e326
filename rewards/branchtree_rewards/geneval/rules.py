"""GenEval's rules, by its `evaluate_images.py`: whether objects that were found are as a check asks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from branchtree_rewards.geneval.check import Included, SceneCheck

Box = tuple[float, float, float, float]  # left, top, right and bottom, in pixels
NEAR = 0.1  # of both objects' sizes: their centres must be further apart than that
LEAST = 1e-3  # pixels of distance that count as any
SLANT = 0.5  # of the distance, that a direction must exceed along its axis


@dataclass(frozen=True)
class Found:
    """An object in a picture."""

    box: Box
    confidence: float


Objects = Mapping[str, Sequence[Found]]
"""The objects in a picture by class, the surest first."""
ColoursOf = Callable[[str, Sequence[Found]], Sequence[str]]
"""Names the colour of each of a class's objects."""


def judge(check: SceneCheck, objects: Objects, colours_of: ColoursOf) -> list[bool]:
    """Return which of a check's conditions hold, in order.

    Each entry under `include` is one for its number, one more for its colour and one more for its position; each under
    `exclude` is one. As GenEval does, only the surest objects are looked at, as many as asked for; a colour can hold
    only where the number does, and a position only where number and colour do, also those of the entry it refers to.
    """
    held: list[bool] = []
    groups: list[Sequence[Found] | None] = []  # of each entry the objects that are as asked, if they are
    for wanted in check.include:
        found = objects.get(wanted.name, ())[: wanted.count]
        conditions = _conditions(wanted, found, groups, colours_of)
        held += conditions
        groups.append(found if all(conditions) else None)
    return held + [len(objects.get(unwanted.name, ())) < unwanted.count for unwanted in check.exclude]


def _conditions(
    wanted: Included, found: Sequence[Found], groups: Sequence[Sequence[Found] | None], colours_of: ColoursOf
) -> list[bool]:
    conditions = [len(found) == wanted.count]
    if wanted.color is not None:
        named = colours_of(wanted.name, found) if conditions[0] else ()
        conditions.append(conditions[0] and all(colour == wanted.color for colour in named))
    if wanted.position is not None:
        position, index = wanted.position
        others = groups[index] if all(conditions) else None
        conditions.append(
            others is not None and all(position in positions(one.box, other.box) for one in found for other in others)
        )
    return conditions


def positions(one: Box, other: Box) -> set[str]:
    """Return where a box lies relative to another: in one or two of the four directions, or in none if it is near."""
    offset, beyond = [], []
    for axis in (0, 1):
        apart = (one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2
        sizes = abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis])
        offset.append(apart)
        beyond.append(math.copysign(max(abs(apart) - NEAR * sizes, 0.0), apart))
    if all(abs(distance) < LEAST for distance in beyond):
        return set()
    across, down = (distance / math.hypot(*offset) for distance in beyond)
    directions = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, share in directions.items() if share > SLANT}
