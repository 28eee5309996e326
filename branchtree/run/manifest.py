"""A folder's manifest: size and SHA-256 of every file in it, by which damage is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError
from branchtree.files.checksums import MANIFEST, file_sha256
from branchtree.files.json_lines import read_json_object

FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Describe every file that lies in a folder; nothing may be written into it afterwards."""
    files = {
        name: {"size": path.stat().st_size, "sha256": require_digest(path)} for name, path in _files(folder).items()
    }
    (folder / MANIFEST).write_bytes(_manifest(files))


def extended_manifest(folder: Path, files: Mapping[str, bytes]) -> bytes:
    """Return a folder's manifest as it is to be once more ``files`` are in it. Raises CheckpointError."""
    more = {name: {"size": len(one), "sha256": hashlib.sha256(one).hexdigest()} for name, one in files.items()}
    return _manifest(dict(sorted({**_read(folder), **more}.items())))


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()


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
        if require_digest(path) != expected[name]["sha256"]:
            raise CheckpointError(f"{path}: its content is not what was written (SHA-256 differs)")


def first_foreign(folder: Path, known: Collection[str]) -> Path | None:
    """The first file in a folder that is not as it was written, or None; ``known`` are the digests of its manifests."""
    if not (folder / MANIFEST).is_file() or require_digest(folder / MANIFEST) not in known:
        return next(iter(sorted(path for path in folder.rglob("*") if not path.is_dir())), folder)
    listed, written = _read(folder), (folder / MANIFEST).lstat().st_ctime_ns
    files = _files(folder).items()
    return next((path for name, path in files if not _as_written(path, listed.get(name), written)), None)


def remove_listed(folder: Path, known: Collection[str]) -> None:
    """Delete the files of a folder that are as its manifest says, last the manifest, and folders that are empty then.

    ``known`` are the digests of its manifests. Raises CheckpointError if it has none of them.
    """
    if require_digest(folder / MANIFEST) not in known:
        raise CheckpointError(f"{folder / MANIFEST}: was not written by this run")
    listed, written = _read(folder), (folder / MANIFEST).lstat().st_ctime_ns
    try:
        for name, path in _files(folder).items():
            if _as_written(path, listed.get(name), written):
                path.unlink()
        if not _files(folder):
            (folder / MANIFEST).unlink()
        for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                inner.rmdir()
        with suppress(OSError):
            folder.rmdir()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be deleted: {error.strerror}") from error


def _as_written(path: Path, listed: Mapping[str, Any] | None, written: int) -> bool:
    """Return whether a file is the one that was listed. Only one that was changed after the manifest has to be read."""
    if listed is None or path.is_symlink():
        return False
    status = path.lstat()
    if status.st_size != listed["size"]:
        return False
    return status.st_ctime_ns <= written or require_digest(path) == listed["sha256"]


def require_digest(path: Path) -> str:
    """The SHA-256 of a file. Raises CheckpointError if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    try:
        content = read_json_object(path, CheckpointError)
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
