"""Reading of files that users name: regular files of UTF-8 text; all others are refused with the reason."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from branchtree.errors import BranchTreeError, DataError, shortened

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the marks of UTF-32 begin with one of these, or with NUL


def user_path(path: str | Path) -> Path:
    """Return a path with ``~`` or ``~name`` replaced by the home folder; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def failure_reason(error: OSError | ValueError) -> str:
    """Return why a path cannot be opened: the system's reason, or Python's for a text that cannot be a path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def require_file(path: Path, missing: BranchTreeError) -> None:
    """Raise ``missing`` if there is no such file, or an error of its class if the path is no regular file.

    A pipe or a device is refused before it is opened, since reading one may never end.
    """
    kind = type(missing)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise missing from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character, or half a character
        raise kind(f"{shortened(str(path))}: cannot be read: {failure_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise missing
    if not stat.S_ISREG(mode):
        raise kind(f"{path}: is no regular file but a pipe, a socket or a device; copy its content into a file")


def require_content(path: Path, at: str) -> None:
    """Raise DataError that begins with ``at`` if there is no such file, or if it is empty."""
    try:
        if not path.is_file():
            raise DataError(f"{at}there is no file '{path}'")
        if path.stat().st_size == 0:
            raise DataError(f"{at}file '{path}' is empty (0 bytes)")
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise DataError(f"{at}file '{path}' cannot be read: {failure_reason(error)}") from None


def require_name(path: Path, kind: type[BranchTreeError]) -> None:
    """Raise an error of ``kind`` for a path that the system does not accept, such as one with too long a name."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise kind(f"{shortened(str(path))}: cannot be used: {failure_reason(error)}; name another") from None


def read_text(path: Path, kind: type[BranchTreeError]) -> str:
    """Return the text of a regular UTF-8 file, with line feeds at the ends of lines and no byte order mark.

    Raises an error of ``kind`` that names the file, the line that is not UTF-8, and the remedy.
    """
    require_file(path, kind(f"{path}: cannot be read: there is no such file"))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise kind(f"{path}: cannot be read: {failure_reason(error)}") from None
    if content.startswith(UTF_16):
        raise kind(f"{path}: is UTF-16 or UTF-32 text; save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        *lines, last = content[: error.start].decode().split("\n")
        raise kind(
            f"{path}:{len(lines) + 1}: is not UTF-8 text: byte 0x{content[error.start]:02x} after {last[-20:]!r}, as "
            "in Windows' or another older encoding; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise kind(f"{path}:{line}: holds NUL characters, as UTF-16 and binary files do; save it as UTF-8 text")
    return text


def half_character(text: str) -> str | None:
    """Return the first surrogate of a text, half a character that UTF-8 does not have; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def whole_text(text: str) -> str:
    """Return the text with codes instead of half characters, so that it can be written to any file."""
    return text.encode("utf-8", "backslashreplace").decode()
