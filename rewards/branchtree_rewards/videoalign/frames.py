"""Frames that VideoAlign looks at: their choice, their size, and the patches they are cut into.

Axis letters: T all frames of a video, N sampled frames, C channels, H height, W width. The rules are those of
`vision_process.py` in KwaiVGI/VideoAlign, with its "uniform" sampling, and of the Qwen2-VL video processor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from branchtree_rewards.shared.pixels import normalised, to_rgb, to_uint8

PATCH = 14  # pixels along one side of a patch
MERGE = 2  # patches along one side of what becomes one token
UNIT = PATCH * MERGE
PAIR = 2  # frames in a patch
MIN_PIXELS = 128 * UNIT * UNIT  # of a frame, after the resize
MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_ASPECT = 200


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint wants its frames."""

    fps: float = 2.0
    max_pixels: int = 448 * 448  # of a frame
    frames: int | None = None  # a fixed number instead of a rate


@dataclass(frozen=True)
class Patches:
    """One video as the vision encoder takes it."""

    pixels: Tensor  # (patches, C * 2 * 14 * 14) float32
    grid: tuple[int, int, int]  # frame pairs, and patches down and across; their product is the number of patches

    @property
    def tokens(self) -> int:
        """How many tokens stand for the video in the text."""
        return math.prod(self.grid) // MERGE**2


def frame_indices(total: int, fps: float, sampling: Sampling) -> list[int]:
    """Return the indices of the frames to look at, of ``total`` ones that play at ``fps`` a second.

    They are an even number, and the first and the last are among them. Raises ValueError if the video is too short.
    """
    if sampling.frames is None:
        most = min(MAX_FRAMES, total) // PAIR * PAIR
        wanted = min(max(total / fps * sampling.fps, MIN_FRAMES), most)
    else:
        wanted = sampling.frames
    count = min(round(wanted / PAIR) * PAIR, total)
    if count < PAIR or count % PAIR:
        raise ValueError(f"a video of {total} frames is too short; frames are taken in pairs")
    return torch.linspace(0, total - 1, count).round().long().tolist()


def frame_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Return height and width in pixels after the resize: multiples of 28, of about the same aspect.

    The area is at most ``max_pixels``. Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"frames of {width}x{height} are too elongated; at most 1:{MAX_ASPECT} can be scored")
    sides = [max(UNIT, round(side / UNIT) * UNIT) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [math.floor(side / shrink / UNIT) * UNIT for side in (height, width)]
    elif math.prod(sides) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        sides = [math.ceil(side * grow / UNIT) * UNIT for side in (height, width)]
    if min(sides) < UNIT:
        raise ValueError(f"frames of {width}x{height} are too elongated: the shorter side falls below {UNIT} pixels")
    return sides[0], sides[1]


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize 8-bit frames (N, C, H, W) to ``size``, as float32 whole numbers in 0..255.

    This is torchvision's bicubic resize of 8-bit tensors with antialiasing, to the bit.
    """
    return F.interpolate(frames.float(), size, mode="bicubic", antialias=True).clamp(0, 255).round()


def patches(frames: Tensor, max_pixels: int) -> Patches:
    """Resize, normalise and cut up sampled frames (N, C, H, W) in [0, 1], N even.

    A patch holds C x 2 x 14 x 14 numbers; the four patches that become one token follow each other.
    Raises ValueError if the frames cannot be resized, or have another number of channels than 1, 3 or 4.
    """
    height, width = frame_size(frames.shape[-2], frames.shape[-1], max_pixels)
    pixels = normalised(resize_frames(to_uint8(to_rgb(frames)), (height, width)) / 255)
    pairs, down, across = len(frames) // PAIR, height // UNIT, width // UNIT
    blocks = pixels.reshape(pairs, PAIR, 3, down, MERGE, PATCH, across, MERGE, PATCH)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * PAIR * PATCH**2)
    return Patches(rows, (pairs, down * MERGE, across * MERGE))
