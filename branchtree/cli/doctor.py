"""The command ``doctor``, which looks for what a machine lacks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from branchtree.cli.arguments import OverridesArgument, parse_overrides
from branchtree.cli.console import make_console, visible

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")] = "quickstart",
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of checks as JSON.")] = False,
) -> None:
    """Check what a recipe needs: versions, GPU, plug-ins, hub, disk, prompts, licences, and one tiny iteration."""
    from branchtree.doctor import Check, examine

    console = make_console(soft_wrap=True)
    checks: list[Check] = []
    for check in examine(recipe, parse_overrides(overrides or [])):
        checks.append(check)
        if not as_json:
            console.print(Text(f"{check.state:5s}", COLOURS[check.state]) + f"{check.name}: {visible(check.text)}")
            if check.remedy:
                console.print(f"     -> {visible(check.remedy)}")
    failed = sum(check.state == "fail" for check in checks)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))  # noqa: T201 - for programs, as it is
    else:
        warned = sum(check.state == "warn" for check in checks)
        console.print(f"{len(checks)} checks: {failed} failed, {warned} warnings.")
    if failed:
        raise typer.Exit(1)
