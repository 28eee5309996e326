"""The command ``compare``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from branchtree.cli.arguments import parse_overrides
from branchtree.cli.console import make_console
from branchtree.errors import RecipeError

if TYPE_CHECKING:
    from branchtree.studies.compare.table import Sheet

KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*(?==)")
"""How a word begins that overrides a key of all rows; every other word is a recipe."""


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes, each with changes of its own as in RECIPE@key=value,key=value; and changes of all.",
        ),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds; every row is run once with each.")] = "0,1,2",
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations of the first row; all rows take as many optimiser steps.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Row equivalents that every run may spend: rollout + 3 x gradient rows.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2,...", help="A row for each value, of every recipe; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")] = 1,
    output: Annotated[Path, typer.Option(help="Holds the runs, the table and the page.")] = Path("runs/compare"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Use the recipes' bundled small models and rewards.")] = False,
    title: Annotated[str, typer.Option(help="Title of the table and the page.")] = "",
) -> None:
    """Compare recipes under the same seeds, prompts and budget; run it again to go on."""
    from branchtree.api import compare as run
    from branchtree.studies.compare.run import PAGE, TABLE
    from branchtree.studies.compare.table import reward_sheet, unfinished, work_sheet

    console = make_console(soft_wrap=True)
    named, overrides = parse_words(recipes)
    comparison = run(
        named,
        overrides,
        seeds=parse_seeds(seeds),
        iterations=iterations,
        rows=rows,
        grid=grid or (),
        jobs=jobs,
        output=output,
        smoke=smoke,
        title=title,
        log=console.print,
    )
    for sheet in [
        *work_sheet(comparison).split(6),
        *(reward_sheet(comparison, [label]) for label in comparison.labels),
    ]:
        console.print(sheet_table(sheet), soft_wrap=False)
    for line in unfinished(comparison):
        console.print(f"Not finished: {line}", style="red")
    console.print(f"Table: {output / TABLE}\nPage: {output / PAGE}")
    if not comparison.complete:
        raise typer.Exit(1)


def parse_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's recipes and its overrides of all rows: the words that begin with ``key=``."""
    overrides = parse_overrides([word for word in words if KEY.match(word)])
    return [word for word in words if not KEY.match(word)], overrides


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return seeds written as in ``0,1,2``. Raises RecipeError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise RecipeError(f"seeds '{text}': write whole numbers with commas between them, for example 0,1,2") from None


def sheet_table(sheet: Sheet) -> Table:
    """Return a sheet for the terminal; long names are folded."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column(Text(sheet.heads[0]), overflow="fold")
    for head in sheet.heads[1:]:
        table.add_column(Text(head), justify="right", min_width=max(map(len, head.split())))
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    return table
