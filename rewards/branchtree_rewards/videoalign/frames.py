"""Frames that VideoAlign looks at: their choice, their size, and the patches they are cut into.

Axis letters: T all frames of a video, N sampled frames, C channels, H height, W width. The rules are those of
`vision_process.py` in KwaiVGI/VideoAlign, with its "uniform" sampling, and of the Qwen2-VL video processor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from branchtree_rewards.qwen2vl.patches import PAIR, UNIT, Patches, cut_up, fitted_size
from branchtree_rewards.shared.pixels import normalised, to_rgb, to_uint8

MIN_PIXELS = 128 * UNIT * UNIT  # of a frame, after the resize
MIN_FRAMES, MAX_FRAMES = 4, 768


@dataclass(frozen=True)
class Sampling:
    """How a checkpoint wants its frames."""

    fps: float = 2.0
    max_pixels: int = 448 * 448  # of a frame
    frames: int | None = None  # a fixed number instead of a rate


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
    """Return height and width of a frame after the resize. Raises ValueError as `fitted_size` does."""
    return fitted_size(height, width, MIN_PIXELS, max_pixels)


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize 8-bit frames (N, C, H, W) to ``size``, as float32 whole numbers in 0..255.

    This is torchvision's bicubic resize of 8-bit tensors with antialiasing, to the bit.
    """
    return F.interpolate(frames.float(), size, mode="bicubic", antialias=True).clamp(0, 255).round()


def patches(frames: Tensor, max_pixels: int) -> Patches:
    """Resize, normalise and cut up sampled frames (N, C, H, W) in [0, 1], N even.

    Raises ValueError if the frames cannot be resized, or have another number of channels than 1, 3 or 4.
    """
    height, width = frame_size(frames.shape[-2], frames.shape[-1], max_pixels)
    return cut_up(normalised(resize_frames(to_uint8(to_rgb(frames)), (height, width)) / 255))
