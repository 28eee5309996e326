"""Pictures and frames as Qwen2-VL's vision encoder takes them: their size, and the patches they are cut into.

Axis letters: N pictures or frames, C channels, H height, W width. The rules are those of `qwen_vl_utils` and of
Qwen2-VL's processor.
"""

import math
from dataclasses import dataclass

from torch import Tensor

PATCH = 14  # pixels along one side of a patch
MERGE = 2  # patches along one side of what becomes one token
UNIT = PATCH * MERGE
PAIR = 2  # frames in a patch; a picture is shown twice
MAX_ASPECT = 200


@dataclass(frozen=True)
class Patches:
    """One picture or video as the vision encoder takes it."""

    pixels: Tensor  # (patches, C * 2 * 14 * 14) float32
    grid: tuple[int, int, int]  # frame pairs, and patches down and across; their product is the number of patches

    @property
    def tokens(self) -> int:
        """How many tokens stand for it in the text."""
        return math.prod(self.grid) // MERGE**2


def fitted_size(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Return height and width in pixels after the resize: multiples of 28, of about the same aspect.

    The area is at most ``most``. If rounding the sides gives less than ``least``, they grow to at least that; where the
    two are equal, the rounding towards ``most`` may leave less. Raises ValueError if one side is more than 200 times
    the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"frames of {width}x{height} are too elongated; at most 1:{MAX_ASPECT} can be scored")
    sides = [max(UNIT, round(side / UNIT) * UNIT) for side in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [math.floor(side / shrink / UNIT) * UNIT for side in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / UNIT) * UNIT for side in (height, width)]
    if min(sides) < UNIT:
        raise ValueError(f"frames of {width}x{height} are too elongated: the shorter side falls below {UNIT} pixels")
    return sides[0], sides[1]


def cut_up(frames: Tensor) -> Patches:
    """Cut resized and normalised frames (N, C, H, W) up, N even, sides multiples of 28.

    A patch holds C x 2 x 14 x 14 numbers; the four patches that become one token follow each other.
    """
    count, channels, height, width = frames.shape
    pairs, down, across = count // PAIR, height // UNIT, width // UNIT
    blocks = frames.reshape(pairs, PAIR, channels, down, MERGE, PATCH, across, MERGE, PATCH)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * PAIR * PATCH**2)
    return Patches(rows, (pairs, down * MERGE, across * MERGE))
