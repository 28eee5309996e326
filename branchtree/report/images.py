"""Pictures as data URIs, cut down where they are larger than a page can show."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Picture:
    """An embedded picture and the size it had on disk."""

    uri: str
    width: int
    height: int


def embed(path: Path, folder: Path, longest: int) -> Picture | None:
    """Embed a picture that lies under ``folder``, at most ``longest`` pixels along a side; None if it cannot be read.

    Small PNG files are embedded as they are, larger ones as JPEG.
    """
    from PIL import Image

    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return None
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.load()
            width, height = picture.size
            if max(width, height) <= longest:
                return Picture(_uri("png", content), width, height)
            shrunk = picture.convert("RGB")
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    shrunk.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    shrunk.save(encoded, "JPEG", quality=90)
    return Picture(_uri("jpeg", encoded.getvalue()), width, height)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
