"""A folder's manifest: size and SHA-256 of every file in it, by which damage is found and named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Describe every file that lies in a folder; nothing may be written into it afterwards."""
    files = {name: {"size": path.stat().st_size, "sha256": digest(path)} for name, path in _files(folder).items()}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def require_whole(folder: Path) -> None:
    """Compare a folder with its manifest. Raises CheckpointError that names the first file that is not as written."""
    expected, found = _read(folder), _files(folder)
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{folder / name}: is missing")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{folder / name}: was not written with the checkpoint")
    for name, path in found.items():  # sizes first: they cost nothing
        size = path.stat().st_size
        if size != expected[name]["size"]:
            raise CheckpointError(f"{path}: has {size} bytes, and {expected[name]['size']} were written")
    for name, path in found.items():
        if digest(path) != expected[name]["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (SHA-256 differs)")


def digest(path: Path) -> str:
    """The SHA-256 of a file. Raises CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT
        files = {str(name): {"size": one["size"], "sha256": one["sha256"]} for name, one in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no manifest ({type(error).__name__}: {error})") from error
    if not known:
        raise CheckpointError(f"{path}: is of format {content['format']}, and this version reads format {FORMAT}")
    return files


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder but the manifest itself, by its path inside, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in named.items() if name != MANIFEST}
