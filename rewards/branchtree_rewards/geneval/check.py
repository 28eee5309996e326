"""What a picture must hold: a condition's metadata, as each line of GenEval's `evaluation_metadata.jsonl` gives it.

    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red",
     "position": ["left of", 0]}], "exclude": [{"class": "dog", "count": 2}], "prompt": "..."}

An object under `include` must be there at least `count` times, in that colour, and `position` from the object with that
index, which comes before it. One under `exclude` must be there fewer than `count` times.
"""

from typing import Any, Literal, get_args

import pydantic

from branchtree.plugins import Condition
from branchtree_rewards.shared.samples import unreadable_or_empty

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Position = Literal["left of", "right of", "above", "below"]
COLOURS: tuple[str, ...] = get_args(Colour)
COUNTING = "counting"  # the tag of prompts whose objects must be surer
MOST = 100  # objects in a list, and of a class
KEYS = ("include", "exclude")


class Excluded(pydantic.BaseModel, extra="forbid", frozen=True):
    """A class of objects and a number of them."""

    name: str = pydantic.Field(alias="class", max_length=200)
    count: pydantic.StrictInt = pydantic.Field(ge=1, le=MOST)

    @pydantic.field_validator("name")
    @classmethod
    def _is_text(cls, name: str) -> str:
        if flaw := unreadable_or_empty(name):
            raise ValueError(f"{flaw.replace('the prompt', 'the name')}")
        return name


class Included(Excluded, frozen=True):
    """Objects of a class with their colour, and with their position relative to those of another entry."""

    color: Colour | None = None
    position: tuple[Position, pydantic.StrictInt] | None = None


class SceneCheck(pydantic.BaseModel, extra="ignore", frozen=True):
    """What a picture must hold."""

    include: tuple[Included, ...] = pydantic.Field(default=(), max_length=MOST)
    exclude: tuple[Excluded, ...] = pydantic.Field(default=(), max_length=MOST)
    tag: Any = None

    @pydantic.model_validator(mode="after")
    def _points_backwards(self) -> "SceneCheck":
        if not self.include and not self.exclude:
            raise ValueError("there is nothing to look for; give at least one object")
        for index, wanted in enumerate(self.include):
            if wanted.position and not 0 <= wanted.position[1] < index:
                raise ValueError(
                    f"include.{index}.position: the index {wanted.position[1]} must be that of an entry before it"
                )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The classes that are looked for, each once."""
        return tuple(dict.fromkeys(wanted.name for wanted in (*self.include, *self.exclude)))


def read_check(condition: Condition) -> SceneCheck:
    """Return what a condition's metadata asks for. Raises ValueError that says where they are wrong."""
    if not any(key in condition.metadata for key in KEYS):
        raise ValueError(
            'its metadata have no "include" and no "exclude"; write, as GenEval does, '
            '"include": [{"class": "cat", "count": 1}] beside the prompt'
        )
    try:
        return SceneCheck.model_validate(dict(condition.metadata))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in {"missing", "value_error"} else f" (it is {first['input']!r})"
        raise ValueError(f"{at + ': ' if at else ''}{problem[:1].lower()}{problem[1:]}{given}") from None
