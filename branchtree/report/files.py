"""Files of a run as data URIs. Records name files, and are not trusted: nothing outside the run's folder is read."""

from __future__ import annotations

import base64
from pathlib import Path


def content(path: Path, folder: Path, most: int | None = None) -> bytes | None:
    """What a file under ``folder`` holds; None if it lies elsewhere, has over ``most`` bytes, or cannot be read."""
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return None
        if most is not None and path.stat().st_size > most:
            return None
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError):
        return None


def data_uri(kind: str, data: bytes) -> str:
    """Bytes of a media type as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
