"""Where the commands print: text as it is, with what a terminal cannot show replaced."""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def make_console(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A console that takes no text for markup: brackets and colons in names, prompts and paths stay what they are."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def replace_unencodable() -> None:
    """Have standard output replace characters that its encoding lacks; standard error writes their codes already."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def visible(text: str) -> str:
    """A text without control characters, which move a cursor or colour a terminal: their codes stand there."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
