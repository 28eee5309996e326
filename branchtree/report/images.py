"""Pictures as data URIs, shrunk if they are larger than a page can show."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from branchtree.report.files import content, data_uri

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_ANIMATION = 512 * 1024  # bytes
LOSSLESS = 64  # stills with at most this many pixels along a side are lossless


@dataclass(frozen=True)
class Picture:
    """An embedded picture, and its size on disk."""

    uri: str
    width: int
    height: int
    still: str | None = None  # the frame to show instead of an animation where nothing may move


def embed(path: Path, folder: Path, longest: int) -> Picture | None:
    """Embed a picture under ``folder``, at most ``longest`` pixels along a side; None if it cannot be read.

    Small PNG and WebP files are embedded unchanged, larger ones as JPEG, and an animation that is too large as its
    middle frame.
    """
    from PIL import Image

    data = content(path, folder)
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as picture:
            frames = getattr(picture, "n_frames", 1)
            picture.seek(frames // 2 if frames > 1 else 0)
            picture.load()
            kind, frame = f"image/{str(picture.format).lower()}", picture.convert("RGB")
    except (OSError, RuntimeError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return None
    width, height = frame.size
    if max(width, height) > longest:
        frame.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return Picture(_encoded(frame, "JPEG", quality=90), width, height)
    if frames == 1:
        return Picture(data_uri(kind, data), width, height)
    still = _encoded(frame, "WEBP", quality=90, lossless=max(width, height) <= LOSSLESS)
    if len(data) > LARGEST_ANIMATION:
        return Picture(still, width, height)
    return Picture(data_uri(kind, data), width, height, still)


def _encoded(image: Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return data_uri(f"image/{kind.lower()}", buffer.getvalue())
