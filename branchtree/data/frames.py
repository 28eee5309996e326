"""The images of a condition, and the first and the last frame of a video, read from pictures and videos."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from branchtree.data.images import read_image
from branchtree.data.videos import video_frames
from branchtree.plugins.values import Condition

if TYPE_CHECKING:
    from PIL import Image


def first_frame(condition: Condition) -> Image.Image | None:
    """Return the RGB frame that a video starts from: a condition's ``image``, or its ``video``'s first frame, or None.

    Raises DataError naming the condition and the file if it is missing or cannot be read.
    """
    if condition.image is not None:
        return read_image(condition.image, f"{condition}: ", upright=True)
    return None if condition.video is None else _video(condition, condition.video)


def condition_images(condition: Condition) -> list[Image.Image]:
    """Return all images of a condition as RGB, upright; its ``video``'s first frame where it has none.

    Raises DataError like ``first_frame``.
    """
    first = first_frame(condition)
    further = [read_image(path, f"{condition}: ", upright=True) for path in condition.further_images]
    return further if first is None else [first, *further]


def last_frame(condition: Condition) -> Image.Image | None:
    """Return the RGB frame that a video ends on, or None. Raises DataError like ``first_frame``."""
    return None if condition.last_image is None else read_image(condition.last_image, f"{condition}: ", upright=True)


def _video(condition: Condition, path: Path) -> Image.Image:
    from PIL import Image

    with closing(video_frames(path, f"{condition}: ")) as frames:
        return Image.fromarray(next(frames))
