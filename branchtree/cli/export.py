"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchtree.cli.console import make_console
from branchtree.errors import RecipeError
from branchtree.exporting import Format


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    format: Annotated[
        Format,
        typer.Option("--format", "-f", help="Whose names a LoRA's layers get; diffusers also copies whole models."),
    ] = "diffusers",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file or folder; in the run's directory by default.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the model and its card to the Hugging Face hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository a private one.")] = False,
) -> None:
    """Write a run's weights for diffusers, kohya's scripts or ComfyUI, and upload them with --push."""
    from branchtree.api import export as run_export

    if private and push is None:
        raise RecipeError("--private is about --push; add --push ORG/NAME, or leave it out")
    done = run_export(run, format, output=output, push=push, private=private)
    console = make_console()
    for file in done.files:
        console.print(f"Written: {file}", soft_wrap=True)
    if done.address is not None:
        console.print(f"Uploaded: {done.address}", soft_wrap=True)
