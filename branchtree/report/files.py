"""Files of a run as data URIs. Records that name files are not trusted: only the run's folder is read."""

from __future__ import annotations

import base64
from pathlib import Path


def content(path: Path, folder: Path, most: int | None = None) -> bytes | None:
    """Return the content of a file; None if it is outside ``folder``, has over ``most`` bytes, or cannot be read."""
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return None
        if most is not None and path.stat().st_size > most:
            return None
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError):
        return None


def data_uri(kind: str, data: bytes) -> str:
    """Return bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
