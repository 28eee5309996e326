"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from branchtree.errors import RecipeError, shortened

RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys, as in optim.lr=2e-5.")
]
SmokeOption = Annotated[bool, typer.Option("--smoke", help="Use the recipe's bundled small model and rewards.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Start even if the device has less free memory than the plan's estimate.")
]


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Return ``key=value`` words as a mapping. Raises RecipeError for a word without '='."""
    from branchtree.recipe.source import parse_value

    changes: dict[str, Any] = {}
    for word in overrides:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise RecipeError(f"override '{shortened(word)}': write it as key=value, for example optim.lr=2e-5")
        changes[key] = parse_value(value, f"override {shortened(key)}:")
    return changes
