"""Names that users give, and the folders and tracker projects that are named after them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

LONGEST = 180
"""The most bytes of a name in UTF-8. File systems allow 255, and prefixes and suffixes are added."""
UNSAFE = re.compile(r'[<>:"/\\|?*]')
"""Characters that some file system, such as that of Windows, does not allow in a name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows reserves for devices."""
WRONG_LETTERS = {"Cc": "a control character", "Cs": "half a character", "Zl": "a line break", "Zp": "a line break"}
PROJECT_LENGTH = 100
"""The most letters of a tracker project's name: wandb allows 128."""


def checked_name(name: str) -> str:
    """Return a name that a file can have and that stays in its folder. Raises ValueError for any other."""
    if not name.strip() or name.strip() in {".", ".."}:
        raise ValueError("a name needs letters, since folders are named after it")
    if "/" in name or "\\" in name:
        raise ValueError(
            "a name holds no / and no \\, since a folder is named after it; choose the folder with --output"
        )
    for letter in name:
        wrong = WRONG_LETTERS.get(unicodedata.category(letter))
        if wrong:
            raise ValueError(f"a name cannot hold {wrong}, U+{ord(letter):04X}")
    size = len(name.encode())
    if size > LONGEST:
        raise ValueError(f"a name has at most {LONGEST} bytes, since a folder is named after it, and this has {size}")
    return name


def folder_name(name: str) -> str:
    """Return the name of a folder for a recipe or run on any file system; nearly all names stay as they are."""
    plain = "".join("_" if unicodedata.category(letter) in WRONG_LETTERS else letter for letter in name)
    plain = UNSAFE.sub("_", plain).lstrip(". ").encode()[:LONGEST].decode(errors="ignore").rstrip(". ")
    return f"{plain}_" if not plain or RESERVED.fullmatch(plain) else plain


def has_hub_form(text: str) -> bool:
    """Return whether a text is written as an id on the hub, ORG/NAME; a folder may have the same name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def default_output(name: str, study: str = "") -> Path:
    """Return where the run of a recipe of that name is written by default, or a study of it."""
    return Path("runs") / (f"{study}-{folder_name(name)}" if study else folder_name(name))


def project_name(name: str) -> str:
    """Return the name of a tracker's project for a recipe: Latin letters, digits, ``.``, ``_`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:PROJECT_LENGTH] or "run"
