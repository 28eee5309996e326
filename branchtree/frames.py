"""Pictures and videos read from files: the frames that condition a video, and what scoring needs of whole files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from branchtree.errors import DataError
from branchtree.protocols import Condition

if TYPE_CHECKING:
    import numpy as np
    from decord import VideoReader
    from numpy.typing import NDArray
    from PIL import Image


def first_frame(condition: Condition) -> Image.Image | None:
    """The RGB frame that a condition's video starts from: its ``image``, else its ``video``'s first frame, else None.

    Raises DataError naming the condition and the file if it is missing or cannot be read.
    """
    if condition.image is not None:
        return _image(condition, condition.image)
    return None if condition.video is None else _video(condition, condition.video)


def last_frame(condition: Condition) -> Image.Image | None:
    """The RGB frame that a condition's video ends on, or None. Raises DataError like ``first_frame``."""
    return None if condition.last_image is None else _image(condition, condition.last_image)


def _image(condition: Condition, path: Path) -> Image.Image:
    """A whole image, turned upright as its EXIF data asks."""
    from PIL import ImageOps

    return open_image(path, f"{condition}: ", lambda image: ImageOps.exif_transpose(image).convert("RGB"))


def _video(condition: Condition, path: Path) -> Image.Image:
    from PIL import Image

    reader = open_video(path, f"{condition}: ")
    return Image.fromarray(video_frame(reader, 0, path, f"{condition}: "))


def open_image(path: Path, at: str, prepare: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What ``prepare`` makes of the image in a file. Raises DataError that begins with ``at`` and names the file."""
    from PIL import Image, UnidentifiedImageError

    _require_content(path, at)
    try:
        with Image.open(path) as image:
            return prepare(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{at}file '{path}' is no image; give a PNG or JPEG file") from None
    except Exception as error:  # decoders raise many kinds; each means that there is no picture to be had
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"{at}image '{path}' cannot be read: {reason}; give a whole PNG or JPEG file") from None


def open_video(path: Path, at: str) -> VideoReader:
    """decord's reader of a video. Raises DataError that begins with ``at`` and names the file."""
    from decord import DECORDError, VideoReader, cpu

    _require_content(path, at)
    try:
        return VideoReader(str(path), ctx=cpu(0), num_threads=1)
    except (DECORDError, RuntimeError):  # what they say is about decord's own source files
        raise DataError(
            f"{at}video '{path}' cannot be opened by decord: it is no video, has no frames, or is coded in a "
            "way that decord does not know; give a whole MP4 file with H.264 video"
        ) from None


def video_frame(reader: VideoReader, index: int, path: Path, at: str) -> NDArray[np.uint8]:
    """A frame as RGB bytes (H, W, 3). Raises DataError like ``open_video``."""
    from decord import DECORDError

    try:
        pixels: NDArray[np.uint8] = reader[index].asnumpy()
    except (DECORDError, RuntimeError, IndexError):
        which = "first frame" if index == 0 else f"frame {index}"
        raise DataError(
            f"{at}the {which} of video '{path}' cannot be decoded; give a whole MP4 file with H.264 video"
        ) from None
    # decord hands out rows padded to 64 bytes: of a narrow video that is more than 3 numbers for each pixel.
    height, width = pixels.shape[:2]
    return pixels.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _require_content(path: Path, at: str) -> None:
    try:
        if not path.is_file():
            raise DataError(f"{at}there is no file '{path}'")
        if path.stat().st_size == 0:
            raise DataError(f"{at}file '{path}' is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{at}file '{path}' cannot be read: {error.strerror}") from None
