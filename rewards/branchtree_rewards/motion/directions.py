"""Reading from a prompt in which direction its subject is to move."""

import math
import re

Direction = tuple[float, float]
"""A unit vector (x, y) in the image; y grows downwards, so that "up" is (0, -1)."""

AXES: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_WORD = re.compile(r"(?P<way>left|right|up|down)(?:wards?)?")
_VERBS = re.compile(
    r"(?:mov|go|head|driv|rid|fl[iy]|drift|float|glid|slid|fall|drop|sink|ris|climb|travel|run|walk|roll|swim|sail|"
    r"scroll|pan|tilt|rush|shoot|shift|mak|com|turn|march|crawl|cross|jump|leap|soar|descend|ascend|sweep|wander)"
    r"(?:e|es|s|ed|[a-z]?ing)?"
)
_MANNER = re.compile(r"[a-z]+ly|straight|fast|further|and|then|its|way|diagonal")
_OTHER_MEANINGS = re.compile(
    r"\b(?:from|on|at|in) (?:(?:the|its|his|her|their|your|my) )?(?:(?:far|lower|upper|bottom|top) )?(?:left|right)\b"
    r"|\b(?:left|right) (?:hand|arm|leg|foot|eye|ear|wing|paw|shoulder|behind)\b"
    r"|\bright (?:now|away|before|after|next|behind|here|there)\b"
    r"|\b(?:has|have|had|just) left\b"
    r"|\b(?:up|down) (?:the|a) (?:street|road|path|aisle|hall|hallway|corridor|track|lane|river|runway)\b"
    r"|\b(?:up|down) to (?!the left\b|the right\b|left\b|right\b)"
    r"|\bup close\b"
)
_BOUNCING = re.compile(r"\b(?:bounc|rebound|ricochet)")


def named_direction(prompt: str) -> Direction | None:
    """Return the direction that a prompt names, or None unless it names exactly one.

    "left", "right", "up", "down" and the same with "-ward" or "-wards" name one, in any letter case; one of each axis
    together is a diagonal ("up and to the left"). Bare "up" and "down" must follow a verb of motion or another
    direction ("flies straight up", but not "stands up"), or begin the prompt. "from left to right" names where it
    leads; locations and idioms ("on the left", "right hand", "right now") name nothing. Two opposite directions are
    none, and neither is a path that bounces.
    """
    text = re.sub(r"[^a-z]+", " ", prompt.lower()).strip()
    if _BOUNCING.search(text):
        return None
    words = _OTHER_MEANINGS.sub(" , ", text).split()
    moving = (_WORD.fullmatch(word) for i, word in enumerate(words) if _is_of_motion(words, i))
    ways = {match["way"] for match in moving if match}
    x = sum(AXES[way][0] for way in ways)
    y = sum(AXES[way][1] for way in ways)
    if abs(x) + abs(y) != len(ways) or not ways:
        return None
    length = math.hypot(x, y)
    return x / length, y / length


def _is_of_motion(words: list[str], i: int) -> bool:
    """Return whether the word at index ``i`` says where something moves: always, but for "up" and "down"."""
    if words[i] not in ("up", "down"):
        return True
    before = [word for word in words[:i] if not _MANNER.fullmatch(word)]
    return not before or _VERBS.fullmatch(before[-1]) is not None or _WORD.fullmatch(before[-1]) is not None
