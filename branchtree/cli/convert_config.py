"""The command ``convert-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from branchtree.cli.console import make_console, visible


def convert_config(
    file: Annotated[Path, typer.Argument(help="Flow-GRPO's config/grpo.py, or a script of DanceGRPO or MixGRPO.")],
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="The function of a Python file, as in general_ocr_sd3.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="The recipe to extend; the nearest by default.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs; as the file says by default.")] = None,
) -> None:
    """Print a recipe made of another trainer's configuration, which is read and never run."""
    from branchtree.api import convert_config as run

    converted = run(file, config, base=base, gpus=gpus)
    typer.echo(converted.recipe, nl=False)
    if converted.unknown:
        listed = ", ".join(converted.unknown)
        make_console(stderr=True, soft_wrap=True).print(f"without a counterpart, and left out: {visible(listed)}")
