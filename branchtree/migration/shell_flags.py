"""The command in a shell script that starts a trainer: its program and flags, read and never run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from branchtree.errors import RecipeError
from branchtree.files.reading import read_text

COMMAND = re.compile(r"(?P<launch>[^\n;]*?)(?P<program>[\w./-]+\.py)(?P<flags>\s+--[^\n;]*)")
FLAG = re.compile(r"--(?P<name>\w[\w-]*)(?:(?:=|\s+)(?!--)(?P<value>\"[^\"]*\"|'[^']*'|[^\s\"'\\]+))?")
VARIABLE = re.compile(r"^\s*(?:export\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s#]*)", re.MULTILINE)
REFERENCE = re.compile(r"\$\{?(\w+)\}?")


@dataclass(frozen=True)
class ShellCommand:
    """A program, its flags, and on how many devices it runs."""

    program: str
    flags: Mapping[str, str]  # a flag without a value is an empty text
    devices: int


def read_shell_command(path: Path) -> ShellCommand:
    """Read the last command of a script that gives a Python program flags. Raises RecipeError where there is none."""
    text = re.sub(r"(^|\s)#[^\n]*", r"\1", read_text(path, RecipeError))
    commands = list(COMMAND.finditer(re.sub(r"\\\s*\n", " ", text)))
    if not commands:
        raise RecipeError(f"{path}: starts no Python program with flags, as in 'torchrun train_grpo_flux.py --eta 0.3'")
    variables = {name: value.strip("\"'") for name, value in VARIABLE.findall(text)}
    found = commands[-1]
    launch = _flags(found["launch"], variables)
    nodes, each = (_count(launch, *names) for names in (("nnodes",), ("nproc_per_node", "nproc-per-node")))
    return ShellCommand(found["program"], _flags(found["flags"], variables), nodes * each)


def _flags(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    given = {match["name"]: (match["value"] or "").strip("\"'") for match in FLAG.finditer(text)}
    return {
        name: REFERENCE.sub(lambda found: variables.get(found[1], found[0]), value) for name, value in given.items()
    }


def _count(flags: Mapping[str, str], *names: str) -> int:
    text = next((flags[name] for name in names if name in flags), "1")
    return int(text) if text.isdecimal() else 1
