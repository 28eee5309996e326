"""Files that users name: found, told apart from folders and devices, and read as UTF-8 text or refused."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from branchtree.errors import BranchTreeError, DataError, shortened

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # those of UTF-32 begin with them too, or with NUL


def user_path(path: str | Path) -> Path:
    """A path with ``~`` and ``~name`` replaced by the home folder; one of an unknown user stays as it is written."""
    return Path(os.path.expanduser(path))


def failure_reason(error: OSError | ValueError) -> str:
    """Why a path cannot be opened: the system's reason, or that of Python for what can be no path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def require_file(path: Path, missing: BranchTreeError) -> None:
    """Raise ``missing`` where there is no such file, or an error of its kind where the path is no regular file.

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
    """Raise DataError, which begins with ``at``, where there is no such file or where it is empty."""
    try:
        if not path.is_file():
            raise DataError(f"{at}there is no file '{path}'")
        if path.stat().st_size == 0:
            raise DataError(f"{at}file '{path}' is empty (0 bytes)")
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise DataError(f"{at}file '{path}' cannot be read: {failure_reason(error)}") from None


def require_name(path: Path, kind: type[BranchTreeError]) -> None:
    """Raise an error of ``kind`` for a path that the system takes for nothing, as one whose name is too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise kind(f"{shortened(str(path))}: cannot be used: {failure_reason(error)}; name another") from None


def read_text(path: Path, kind: type[BranchTreeError]) -> str:
    """The text of a regular UTF-8 file, with line feeds at its ends of lines and without a byte order mark.

    Raises an error of ``kind`` that names the file, the line where the text is no UTF-8, and the remedy.
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
    """The first surrogate of a text, which stands for half a character and has no UTF-8; None in a whole text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def whole_text(text: str) -> str:
    """The text with codes in place of half characters, so that every file takes it."""
    return text.encode("utf-8", "backslashreplace").decode()
