"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from branchtree.cli.arguments import ForceOption, parse_overrides
from branchtree.cli.console import make_console, visible
from branchtree.cli.progress import late_progress

if TYPE_CHECKING:
    from branchtree.studies.evaluate import EvaluationResult, Interval, RewardComparison


def evaluate(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run's directory, or a recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override keys, as in tree.steps=50.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", "-r", help='A reward in place of the recipe\'s, settings as in "hps version=v2.0"; repeatable.'
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .txt, .jsonl or .parquet file of other prompts.")] = None,
    noises: Annotated[int | None, typer.Option(min=1, help="Samples per prompt.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="The iteration to judge; the newest by default.")] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="Judge a LoRA, a file or folder of any common kind, in place of a run's weights."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where files go; RUN/evaluation by default.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Use the recipe's bundled small model and rewards.")] = False,
    force: ForceOption = False,
) -> None:
    """Judge a run's model, or a LoRA, against its base on held-out prompts, or a recipe's base model alone."""
    from branchtree.api import evaluate as run

    with late_progress("evaluating") as advance:
        result = run(
            subject,
            parse_overrides(overrides or []),
            rewards=reward or None,
            prompts=prompts,
            noises=noises,
            limit=limit,
            checkpoint=checkpoint,
            lora=lora,
            output=output,
            smoke=smoke,
            force=force,
            advance=advance,
        )
    if result.main_process:
        _report(make_console(), result)


def _report(console: Console, result: EvaluationResult) -> None:
    trained = "the LoRA" if result.lora else f"{result.iteration} iterations"
    what = "the base model alone" if result.alone else f"{trained} against the base"
    if result.lora is not None:
        console.print(f"LoRA {visible(str(result.lora))}", soft_wrap=True)
    console.print(f"{result.recipe}: {what}, {result.prompts} prompts x {result.noises} noises", soft_wrap=True)
    console.print(comparison_table(result))
    if any(one.interval is None for one in result.rewards.values()):
        console.print("An interval needs valid samples of at least 2 prompts.")
    console.print(f"Files: {result.output}", soft_wrap=True)


def comparison_table(result: EvaluationResult) -> Table:
    """Return a table with a row per reward: both means, their paired difference and its interval, or one mean alone."""
    alone = result.alone
    level = next((f"{one.interval.level:.0%}" for one in result.rewards.values() if one.interval), "")
    compared = [] if alone else ["Trained", "Difference"]
    shares = [] if alone else ["Improved", "Tied"]
    names = ["Base", *compared, f"{level} interval".strip(), *shares, "Samples" if alone else "Pairs"]
    table = Table(header_style="bold", box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("Held out", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, one in result.rewards.items():
        table.add_row(Text(label), *(_alone(one) if alone else _compared(one)))
    return table


def _alone(one: RewardComparison) -> list[str]:
    return [_number(one.base.mean), _ends(one.interval, ""), _count(one)]


def _compared(one: RewardComparison) -> list[str]:
    means = [_number(one.base.mean), _number(one.trained.mean if one.trained else None)]
    shares = ["-" if share is None else f"{share:.1%}" for share in (one.improved, one.tied)]
    return [*means, _number(one.difference, "+"), _ends(one.interval, "+"), *shares, _count(one)]


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _ends(interval: Interval | None, sign: str) -> str:
    return "-" if interval is None else f"{_number(interval.low, sign)} to {_number(interval.high, sign)}"


def _count(one: RewardComparison) -> str:
    return f"{one.counted} ({one.left_out} not valid)" if one.left_out else str(one.counted)
