"""How a pipeline's ``__call__`` is asked for several samples of one prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A prompt as a pipeline's ``__call__`` takes it."""

    prompt: str
    negative_prompt: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # images and the like, by keyword


Way = Callable[[Asked, int], dict[str, Any]]
"""(prompt, rows) -> keywords that ask for as many samples of the prompt."""
COPIES = ("num_images_per_prompt", "num_videos_per_prompt")
"""Keywords that ask for several samples of a prompt."""


def one_prompt(asked: Asked, rows: int) -> dict[str, Any]:
    """Ask for one sample, whatever ``rows`` is."""
    negative = {} if asked.negative_prompt is None else {"negative_prompt": asked.negative_prompt}
    return {"prompt": asked.prompt, **negative, **asked.extra}


def listed_prompts(asked: Asked, rows: int) -> dict[str, Any]:
    """Ask with a list of prompts, which share the images."""
    texts = {name: [text] * rows for name, text in one_prompt(asked, rows).items() if name not in asked.extra}
    return {**texts, **asked.extra}


def listed_images(asked: Asked, rows: int) -> dict[str, Any]:
    """Ask with a list of prompts and one of images."""
    return {**listed_prompts(asked, rows), **{name: [value] * rows for name, value in asked.extra.items()}}


def copied_prompt(keyword: str, asked: Asked, rows: int) -> dict[str, Any]:
    """Ask for several samples of one prompt by a keyword."""
    return {**one_prompt(asked, rows), keyword: rows}


def ways(taken: Collection[str], copies: str | None, asked: Asked) -> list[Way]:
    """Return the ways to try in turn, of which the last asks for one sample at a time.

    Args:
        taken: Names of the arguments that the pipeline takes.
        copies: The keyword for several samples of a prompt, where only that is right.
        asked: A prompt.
    """
    if copies is not None:
        return [partial(copied_prompt, copies)]
    keywords = [name for name in COPIES if name in taken]
    images = [listed_images] if asked.extra else []
    return [listed_prompts, *images, *(partial(copied_prompt, name) for name in keywords), one_prompt]
