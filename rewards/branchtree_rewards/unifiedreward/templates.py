"""UnifiedReward's questions, and the scores that their answers hold.

The questions are the publisher's, to the byte, and are kept in `data/unifiedreward_*.txt`. They come from
UnifiedReward (https://github.com/CodeGoat24/UnifiedReward, MIT licence), except that of `flowgrpo_llava`, which is the
question that flow_grpo asks of UnifiedReward-7b-v1.5.
"""

import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Literal

TemplateName = Literal["semantic", "score", "acs_v2", "flowgrpo_llava"]
FieldName = Literal["alignment", "coherence", "style", "mean", "final"]

AXES = ("alignment", "coherence", "style")
FILES: dict[TemplateName, str] = {
    "semantic": "unifiedreward_semantic_v1.txt",
    "score": "unifiedreward_score_v1.txt",
    "acs_v2": "unifiedreward_acs_v2.txt",
    "flowgrpo_llava": "unifiedreward_flowgrpo_llava.txt",
}
BY_AXIS: tuple[FieldName, ...] = ("alignment", "coherence", "style", "mean")
FIELDS: dict[TemplateName, tuple[FieldName, ...]] = {
    "semantic": BY_AXIS,
    "acs_v2": BY_AXIS,
    "score": ("final",),
    "flowgrpo_llava": ("final",),
}
OLD, NEW = r"unified-?reward-(?:qwen|0\.5b|7b)", r"unified-?reward-?2"  # in names of the first models, and the 2.0 ones
OTHERS: dict[TemplateName, str] = {"semantic": NEW, "score": NEW, "acs_v2": OLD, "flowgrpo_llava": rf"{NEW}|qwen"}
"""Names of models that were trained on other questions."""
LABELS = {**{axis: f"{axis.capitalize()} Score (1-5)" for axis in AXES}, "final": "Final Score"}
LOWEST = {"alignment": 1.0, "coherence": 1.0, "style": 1.0, "final": 0.0}
HIGHEST = 5.0
# A number that ends where it seems to: not 1 of 10, of 1.5.2, of 1e3 or of 1-2, and out of 5 where it is out of any.
NUMBER = re.compile(r"[\s*]*([0-9]++(?:\.[0-9]++)?+)(?![\w%]|[.,\u2013-][0-9]|\s*/\s*(?!5(?![\w.]))[0-9])")
TAIL = 80  # characters of an answer that a reason quotes


@dataclass(frozen=True)
class Spoken:
    """A model's answer to one question."""

    text: str
    complete: bool = True  # False: it was cut off at the limit of tokens


@dataclass(frozen=True)
class NoScore:
    """The reason why there is no answer, or no score in it."""

    reason: str


def fill_template(template: TemplateName, caption: str) -> str:
    """Return the template's text with ``caption`` filled in."""
    text = resources.files("branchtree_rewards").joinpath("data", FILES[template]).read_text(encoding="utf-8")
    before, after = text.split("{}")
    return f"{before}{caption}{after}"


def read_score(answer: Spoken, name: str) -> float | NoScore:
    """Return the number after the last label of field ``name``, or why there is none.

    The label is written as the question asks for it; asterisks of markdown may surround label, colon and number. The
    number must lie in [1, 5], or [0, 5] for the final score. A number at the very end of an answer that was cut off is
    not one, since digits may be missing.
    """
    label = rf"{re.escape(LABELS[name])}\**\s*:"
    found = list(re.finditer(label, answer.text))
    if not found:
        cut = "" if answer.complete else ", and the answer was cut off at the limit of tokens"
        return NoScore(f"the answer has no '{LABELS[name]}:'{cut}{_quoted(answer)}")
    number = NUMBER.match(answer.text, found[-1].end())
    if number is None:
        return NoScore(f"no number follows '{LABELS[name]}:'{_quoted(answer)}")
    if not answer.complete and number.end() == len(answer.text):
        return NoScore(f"the answer was cut off within the number after '{LABELS[name]}:'{_quoted(answer)}")
    value = float(number[1])
    if not LOWEST[name] <= value <= HIGHEST:
        return NoScore(f"'{LABELS[name]}: {number[1][:20]}' is not between {LOWEST[name]:g} and 5{_quoted(answer)}")
    return value


def read_axes(answer: Spoken, template: TemplateName) -> dict[str, float]:
    """Return the three axes' scores, NaN for those that the template does not ask for or the answer does not give."""
    if "mean" not in FIELDS[template]:
        return dict.fromkeys(AXES, math.nan)
    scores = {name: read_score(answer, name) for name in AXES}
    return {name: math.nan if isinstance(score, NoScore) else score for name, score in scores.items()}


def read_field(answer: Spoken, name: FieldName) -> float | NoScore:
    """Return the score of one field, or why there is none; ``mean`` is the mean of all three axes."""
    if name != "mean":
        return read_score(answer, name)
    total = 0.0
    for axis in AXES:
        score = read_score(answer, axis)
        if isinstance(score, NoScore):
            return score
        total += score
    return total / len(AXES)


def _quoted(answer: Spoken) -> str:
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(answer.text.split()))
    if not line:
        return "; it is empty"
    return f"; it ends in '{line[-TAIL:]}'" if len(line) > TAIL else f"; it is '{line}'"
