"""Writes that fail, told in one way wherever the failure comes from."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from branchtree.errors import BranchTreeError, OutputError

DISK = frozenset(
    {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
)
"""What the system calls a disk that is full, read-only, forbidden, broken, or gone."""
RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is written in Rust, ends the message of a failed write."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes to ``path``. Raises OutputError, naming the path and the reason, if the disk refuses."""
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
    """The system's reason if an error is, or came of, a write that the disk refused; otherwise None.

    PyTorch raises a RuntimeError while the OSError of its file is handled, and safetensors puts the number in a text.
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
