"""The pixels of files, as they lie there: nothing is resized, turned or blended.

Publishers' own scoring opens a picture and converts it to RGB, no more: an alpha channel is left out, and the EXIF
orientation is not followed. So it is here, that a file gets the number that its publisher gives it.
Axis letters: B samples, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchtree.errors import DataError
from branchtree.frames import open_image, open_video, video_frame
from branchtree.protocols import Media
from branchtree.scoring.items import Item

if TYPE_CHECKING:
    from PIL import Image

ANIMATIONS = frozenset({"GIF", "PNG", "WEBP"})  # a camera's JPEG may hold a preview as a second picture


@dataclass(frozen=True)
class Form:
    """What samples of one batch have in common."""

    kind: str
    shape: tuple[int, ...]  # (H, W, 3), or (F, H, W, 3)
    fps: float | None

    @property
    def numbers(self) -> int:
        """How many a sample is made of."""
        return int(np.prod(self.shape))

    def __str__(self) -> str:
        """As one would say it: 640x480, or 81 frames of 640x480 at 16 fps."""
        size = f"{self.shape[-2]}x{self.shape[-3]}"
        return size if self.kind == "image" else f"{self.shape[0]} frames of {size} at {self.fps:.4g} fps"


def form(item: Item) -> Form:
    """An item's form; an image is decoded, of a video its first frame. Raises DataError naming place and file."""
    if item.kind == "image":
        return Form("image", _image(item).shape, None)
    reader = open_video(item.path, item.at)
    first = video_frame(reader, 0, item.path, item.at)
    return Form("video", (len(reader), *first.shape), float(reader.get_avg_fps()))


def read(items: Sequence[Item], like: Form) -> Media:
    """The files of one form, as float32 on the CPU: bytes / 255. Raises DataError naming place and file."""
    if like.kind == "image":
        return Media(images=_floats([_image(item) for item in items]))
    return Media(videos=_floats([_video(item) for item in items]), fps=like.fps)


def _image(item: Item) -> NDArray[np.uint8]:
    def still(image: Image.Image) -> Image.Image:
        if image.format in ANIMATIONS and getattr(image, "is_animated", False):
            raise DataError(
                f"{item.at}image '{item.path}' is an animation; give one frame of it, or the whole as an MP4 video"
            )
        return image.convert("RGB")

    return np.asarray(open_image(item.path, item.at, still))


def _video(item: Item) -> NDArray[np.uint8]:
    reader = open_video(item.path, item.at)
    return np.stack([video_frame(reader, index, item.path, item.at) for index in range(len(reader))])


def _floats(samples: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Samples (..., H, W, C) as (B, ..., C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.stack(samples)).movedim(-1, -3)
    return pixels.contiguous().to(torch.float32) / 255
