"""The command ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchtree.cli.console import make_console


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
    from branchtree.studies.compare.compare import PAGE, TABLE
    from branchtree.studies.compare.request import parse_seeds, parse_words
    from branchtree.studies.compare.table import reward_sheet, terminal, troubles, work_sheet

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
        tell=console.print,
    )
    for sheet in [
        *work_sheet(comparison).parts(6),
        *(reward_sheet(comparison, [label]) for label in comparison.labels),
    ]:
        console.print(terminal(sheet), soft_wrap=False)
    for trouble in troubles(comparison):
        console.print(f"Not finished: {trouble}", style="red")
    console.print(f"Table: {output / TABLE}\nPage: {output / PAGE}")
    if not comparison.complete:
        raise typer.Exit(1)
