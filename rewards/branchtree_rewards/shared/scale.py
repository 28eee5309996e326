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
    if over := re.fullmatch(rf"div({NUMBER})|mix\(\s*(-?{NUMBER})\s*,\s*({NUMBER})\s*\)", scale):
        centre, divisor = float(over[2] or 0), float(over[1] or over[3])
        if divisor == 0:
            raise ValueError(f"scale '{scale}' divides by 0")
        return lambda raw: (raw - centre) / divisor
    raise ValueError(f"'{scale}' is no scale; write raw, x100, div26, mix(18,8) or clipscore, with numbers of your own")


ScaleName = Annotated[str, pydantic.AfterValidator(lambda scale: transform(scale) and scale)]
"""A setting that names a scale."""
