"""The console of the commands: text is printed as it is, but for characters that a terminal cannot show."""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console without markup, which prints brackets and colons in names, prompts and paths as they are."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def replace_unencodable() -> None:
    """Make standard output replace characters that its encoding lacks; standard error already writes their codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def visible(text: str) -> str:
    """Return a text with codes instead of control characters, which could move a cursor or colour a terminal."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
