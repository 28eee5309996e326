"""Atomic writing of files, and one way of reporting failed writes, whichever library they come from."""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from branchtree.errors import BranchTreeError, OutputError

DISK = frozenset(
    {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
)
"""The system's error numbers for a disk that is full, read-only, forbidden, broken, or gone."""
RUST = re.compile(r"\(os error (\d+)\)")
"""The end of the message of a failed write by safetensors, which is written in Rust."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write to ``path`` inside the block into an OutputError that names the path and the reason."""
    try:
        yield
    except BranchTreeError:
        raise
    except Exception as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def disk_failure(error: BaseException) -> str | None:
    """Return the system's reason if an error comes from a write that the disk refused; otherwise None.

    PyTorch raises a RuntimeError from an OSError, and safetensors writes the error's number into its message.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    numbers = [int(number) for number in RUST.findall(str(error))]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            numbers.append(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return next((os.strerror(number) for number in numbers if number in DISK), None)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: under a temporary name, which is synced and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # no other process has this name
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # gives the space back on a full disk
        raise


def synchronise(paths: Iterable[Path]) -> None:
    """Sync files and folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_name(path: Path) -> Path:
    """Return the path itself, or, if something already has its name, the name with a number."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def require_own_results(folder: Path, names: Iterable[str], marks: Mapping[str, Collection[str]]) -> None:
    """Refuse, before work is done, to replace files that this command did not write. Raises OutputError, naming one.

    Args:
        folder: Where results will be written.
        names: The files that will be written.
        marks: JSON or .jsonl files that identify earlier results of the command, and keys that they, or their first
            lines, must have.
    """
    if not any(_has_keys(folder / name, keys) for name, keys in marks.items()):
        for path in (folder / name for name in names):
            if path.exists() or path.is_symlink():
                raise OutputError(
                    f"{path}: is in the way, and was not written by this command; choose another --output"
                )


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)
