"""The command ``diversity``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from branchtree.cli.arguments import parse_overrides
from branchtree.cli.console import make_console
from branchtree.cli.progress import late_progress

if TYPE_CHECKING:
    from branchtree.studies.diversity import Discrepancy, Study


def diversity(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run's directory, or a recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys, as in tree.strength=8.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of each set, rounded up to whole trees.")] = 4096,
    features: Annotated[
        list[str] | None,
        typer.Option("--features", "-f", help='A feature space, as in "clip normalize=true"; pixels if none is named.'),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .txt, .jsonl or .parquet file; else training's.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Values to branch with, as in tree.strength=1,2,4,8; repeated: all combinations."),
    ] = None,
    shared_noise: Annotated[
        bool,
        typer.Option("--shared-noise/--own-noise", help="Groups of plain samples start from one initial noise or not."),
    ] = True,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all noise; the recipe's by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where files go; RUN/diversity by default.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Use the recipe's bundled small model.")] = False,
) -> None:
    """Compare branched with plain rollouts of one model: KID, MMD^2, and distances within prompts."""
    from branchtree.api import diversity as run

    with late_progress("sampling") as advance:
        study = run(
            subject,
            parse_overrides(overrides or []),
            samples=samples,
            features=features or "pixels",
            prompts=prompts,
            grid=grid or (),
            shared_noise=shared_noise,
            seed=seed,
            output=output,
            smoke=smoke,
            advance=advance,
        )
    _report(make_console(), study)


def _report(console: Console, study: Study) -> None:
    from branchtree.studies.diversity.run import sets_in_words

    layout, request = study.request.layout, study.request
    what = "base model" if request.subject.iteration is None else f"after {request.subject.iteration} iterations"
    lines = [
        f"{request.recipe.name}, {what}: {layout.samples} samples a set, {layout.groups} groups of {layout.size}, "
        f"{len(layout.conditions)} prompts",
        *(f"{name}: {words}" for name, words in sets_in_words(request).items()),
        *(f"{label}: {backend}" for label, backend in study.backends.items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    for label in study.backends:
        console.print(discrepancy_table(label, [one for one in study.discrepancies if one.features == label]))
    console.print("KID, unbiased and biased take samples of a group as independent; 'groups apart' does not.")
    console.print(group_table(study))
    console.print(f"Files: {request.output}", soft_wrap=True)


def discrepancy_table(label: str, found: Sequence[Discrepancy]) -> Table:
    """Return a table with a row for each kernel and pair of sets; the control is below the set compared with it."""
    table = Table("Kernel", "MMD^2 of", title=Text(label), title_justify="left", header_style="bold")
    for name in ("KID", "unbiased", "biased", "groups apart", f"{found[0].groups.level:.0%} interval"):
        table.add_column(name, justify="right")
    for one in sorted(found, key=lambda one: one.kernel):
        kid = "-" if one.kid is None else f"{one.kid.mean:.3g} +- {one.kid.std:.1g}"
        kernel = one.kernel if one.bandwidth is None else f"{one.kernel}, h {one.bandwidth:.3g}"
        sets = f"{one.first}, {one.second}"
        inner = one.groups
        ends = f"{inner.low:.2g} to {inner.high:.2g}"
        table.add_row(kernel, sets, kid, f"{one.unbiased:.3g}", f"{one.biased:.3g}", f"{inner.value:.3g}", ends)
    return table


def group_table(study: Study) -> Table:
    """Return a table of the mean distance between samples of a group, one row per way of sampling."""
    table = Table(title="Distance within groups", title_justify="left", header_style="bold")
    table.add_column("Samples", overflow="fold")
    table.add_column("Size", justify="right")
    for label in study.groups[0].spreads:
        table.add_column(Text(label), justify="right")
    for row in study.groups:
        cells = ["-" if one is None else f"{one.mean:.4g} +- {one.error:.1g}" for one in row.spreads.values()]
        table.add_row(Text(row.name), str(row.size), *cells)
    return table
