"""How VBench shows frames to its models.

Frames are float32 with the values 0 to 255 of their bytes, as VBench reads them from an MP4 file, and are resized
without antialiasing. Axis letters: T frames, H height, W width, S side of a square.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from branchtree_rewards.shared.pixels import normalised, to_rgb, to_uint8


def byte_values(video: Tensor) -> Tensor:
    """A video (T, C, H, W) in [0, 1] as float (T, 3, H, W) with whole values from 0 to 255."""
    return to_uint8(to_rgb(video)).float()


def clip_input(frames: Tensor, size: int) -> Tensor:
    """Frames (T, 3, H, W) from 0 to 255 as CLIP takes them, (T, 3, S, S).

    The shorter side is resized to ``size``, bicubic, and the middle cut out. As the numbers are floats nothing holds
    them to 0 and 255 there: at sharp edges they overshoot, and VBench leaves that as it is.
    """
    height, width = frames.shape[-2:]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    new = (size, other) if height <= width else (other, size)
    resized = functional.interpolate(frames, new, mode="bicubic", align_corners=False, antialias=False)
    top, left = (round((side - size) / 2.0) for side in new)
    return normalised(resized[..., top : top + size, left : left + size] / 255)


def longer_side(frames: Tensor, longest: int) -> Tensor:
    """Frames (T, 3, H, W) shrunk, bilinear, until no side is longer than ``longest``; smaller ones pass."""
    height, width = frames.shape[-2:]
    if max(height, width) <= longest:
        return frames
    scale = float(longest) / max(height, width)
    new = (int(scale * height), int(scale * width))
    return functional.interpolate(frames, new, mode="bilinear", align_corners=False, antialias=False)


def margins(height: int, width: int, unit: int) -> tuple[int, int, int, int]:
    """Pixels to add left, right, above and below until both sides are multiples of ``unit``; the odd one comes last."""
    across, down = -width % unit, -height % unit
    return across // 2, across - across // 2, down // 2, down - down // 2


def padded(frames: Tensor, unit: int) -> Tensor:
    """Frames (T, 3, H, W) whose edges are repeated until both sides are multiples of ``unit``."""
    return functional.pad(frames, margins(frames.shape[-2], frames.shape[-1], unit), mode="replicate")


def unpadded(frames: Tensor, height: int, width: int, unit: int) -> Tensor:
    """Frames (T, 3, height, width) as they were before ``padded``."""
    left, _, top, _ = margins(height, width, unit)
    return frames[..., top : top + height, left : left + width]
