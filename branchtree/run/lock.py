"""One process at a time in a run directory: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from branchtree.errors import OutputError

log = logging.getLogger("branchtree")

LOCK = ".branchtree.lock"
UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What a file system without locks answers."""


@contextmanager
def sole_process(root: Path) -> Iterator[None]:
    """A block in which no other process can enter the same one for a run directory, which is made if need be.

    Raises OutputError if another process is in it, naming that process and its host, or if the directory cannot be
    written. On a file system without locks it warns and goes on.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(root / LOCK)
    except OSError as error:
        raise OutputError(f"{root}: cannot be written: {error.strerror}; choose another --output") from None
    try:
        yield
    finally:
        # Whoever waits for this very file finds, by its number, that it is no longer the one of that name.
        if _is_named(descriptor, root / LOCK):
            (root / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def writer(root: Path) -> str | None:
    """Return which process writes to a run directory, as in "process 7 on host"; None if none does.

    It reads the lock without taking it, so that a run which starts meanwhile is not refused. A process of another host
    is taken to be alive.
    """
    try:
        pid, host = _content(root / LOCK)
        if host == socket.gethostname():
            os.kill(pid, 0)
    except PermissionError:  # a process of another user
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"process {pid} on {host}"


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on the file of that name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            if _is_named(descriptor, path):
                holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
                os.truncate(descriptor, 0)
                os.write(descriptor, holder)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder was just ending


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{path.parent}: {_holder(path)} is writing to it; wait for its end, or stop it") from None
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        log.warning(
            "%s lies on a file system without locks (%s): make sure that no other process writes to it",
            path.parent,
            error,
        )


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        pid, host = _content(path)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"process {pid} on {host}"


def _content(path: Path) -> tuple[int, str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return int(content["pid"]), str(content["host"])
