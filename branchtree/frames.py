"""First and last frames that condition a video: read from image files, or from a video's first frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from branchtree.errors import DataError
from branchtree.protocols import Condition

if TYPE_CHECKING:
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
    from PIL import Image, ImageOps, UnidentifiedImageError

    _require_content(condition, path)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{condition}: file '{path}' is no image; give a PNG or JPEG file") from None
    except Exception as error:  # decoders raise many kinds; each means that there is no picture to be had
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"{condition}: image '{path}' cannot be read: {reason}; give a whole PNG or JPEG file"
        ) from None


def _video(condition: Condition, path: Path) -> Image.Image:
    from decord import DECORDError, VideoReader, cpu
    from PIL import Image

    _require_content(condition, path)
    try:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
    except (DECORDError, RuntimeError):  # what they say is about decord's own source files
        raise DataError(
            f"{condition}: video '{path}' cannot be opened by decord: it is no video, has no frames, or is coded in a "
            "way that decord does not know; give a whole MP4 file with H.264 video"
        ) from None
    try:
        pixels = reader[0].asnumpy()
    except (DECORDError, RuntimeError, IndexError):
        raise DataError(
            f"{condition}: the first frame of video '{path}' cannot be decoded; give a whole MP4 file with H.264 video"
        ) from None
    # decord hands out rows padded to 64 bytes: of a narrow video that is more than 3 numbers for each pixel.
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))


def _require_content(condition: Condition, path: Path) -> None:
    try:
        if not path.is_file():
            raise DataError(f"{condition}: there is no file '{path}'")
        if path.stat().st_size == 0:
            raise DataError(f"{condition}: file '{path}' is empty (0 bytes)")
    except OSError as error:
        raise DataError(f"{condition}: file '{path}' cannot be read: {error.strerror}") from None
