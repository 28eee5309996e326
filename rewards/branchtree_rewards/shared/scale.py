"""The recorded transform between a published model's own number and the value that is trained on.

Public trainers rescale the same score in different ways. Here the raw score is always kept, and the transform is a word
in the recipe:

    raw         x
    x100        100 x, any factor instead of 100
    div26       x / 26, any divisor instead of 26 (flow_grpo divides PickScore by 26)
    mix(18,8)   (x - 18) / 8, any two numbers (MixGRPO's training scale for PickScore)
    clipscore   2.5 max(x, 0) (CLIPScore, arXiv 2104.08718)
"""

import re
from collections.abc import Callable
from typing import Annotated

import pydantic
from torch import Tensor

NUMBER = r"\d+(?:\.\d+)?"


def transform(scale: str) -> Callable[[Tensor], Tensor]:
    """Return the elementwise transform of raw scores (B,) that a word names. Raises ValueError for an unknown word."""
    if scale == "raw":
        return lambda raw: raw
    if scale == "clipscore":
        return lambda raw: 2.5 * raw.clamp(min=0)
    if times := re.fullmatch(f"x({NUMBER})", scale):
        factor = float(times[1])
        return lambda raw: raw * factor
    if over := re.fullmatch(f"div({NUMBER})", scale):
        divisor = _divisor(over[1], scale)
        return lambda raw: raw / divisor
    if shifted := re.fullmatch(rf"mix\(\s*(-?{NUMBER})\s*,\s*({NUMBER})\s*\)", scale):
        centre, width = float(shifted[1]), _divisor(shifted[2], scale)
        return lambda raw: (raw - centre) / width
    raise ValueError(f"'{scale}' is no scale; write raw, x100, div26, mix(18,8) or clipscore, with numbers of your own")


def _divisor(digits: str, scale: str) -> float:
    if float(digits) == 0:
        raise ValueError(f"scale '{scale}' divides by 0")
    return float(digits)


ScaleName = Annotated[str, pydantic.AfterValidator(lambda scale: transform(scale) and scale)]
"""A setting that names a scale."""
