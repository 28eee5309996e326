"""The commands ``score`` and ``rewards``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from branchtree.cli.console import make_console, visible
from branchtree.cli.progress import late_progress

if TYPE_CHECKING:
    from branchtree.plugins.registry import Entry
    from branchtree.studies.score import FileScore, ScoredFile

PROMPT_SHOWN = 40
"""The most characters of a prompt that the table shows."""


def score(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Images, videos, folders, .jsonl lists, or a run's .safetensors."),
    ],
    reward: Annotated[
        list[str], typer.Option("--reward", "-r", help='A reward, with settings as in "hps version=v2.0"; repeatable.')
    ],
    prompt: Annotated[str | None, typer.Option(help="The prompt of files that bring none.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write scores as JSON lines, over what is there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Samples scored at a time; fewer if they are large.")] = 8,
) -> None:
    """Score samples by any rewards; a .jsonl line is {"image", "video" or "samples": path, "prompt": text}."""
    from branchtree.api import score as run

    with late_progress("scoring") as advance:
        scored = run(files, reward, prompt=prompt, output=output, device=device, batch=batch, advance=advance)
    console = make_console()
    console.print(score_table(scored))
    if output is not None:
        console.print(f"Scores: {visible(str(output))}", soft_wrap=True)


def rewards() -> None:
    """List the installed rewards: what they score, their weights, and the licence of these."""
    from branchtree.plugins.registry import registry

    console = make_console()
    console.print(reward_table(list(registry().rewards.values())))
    for broken in registry().broken:
        console.print(str(broken), style="red")


def score_table(scored: Sequence[ScoredFile]) -> Table:
    """Return a table with a row for each file, and below them each reward's mean over its valid scores."""
    labels = list(scored[0].scores)
    table = Table("File", "Prompt", header_style="bold", show_footer=len(scored) > 1)
    for label in labels:
        table.add_column(Text(label), justify="right", footer=_mean([one.scores[label] for one in scored]))
    for column in table.columns:
        column.overflow = "fold"
    for one in scored:
        table.add_row(
            Text(visible(one.file)),
            Text(visible(_shortened(one.prompt))),
            *(_shown(one.scores[label]) for label in labels),
        )
    table.columns[0].footer = "mean"
    return table


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT_SHOWN else f"{prompt[: PROMPT_SHOWN - 3].rstrip()}..."


def _shown(score: FileScore) -> Text:
    if score.value is None:
        return Text(f"invalid: {score.reason}", style="red")
    return Text(f"{score.value:.6g}")


def _mean(scores: Sequence[FileScore]) -> str:
    values = [score.value for score in scores if score.value is not None]
    count = f"({len(values)} of {len(scores)})"
    return f"{sum(values) / len(values):.6g} {count}" if values else f"- {count}"


def reward_table(entries: Sequence[Entry]) -> Table:
    """Return a table with a row for each registered reward; a dash means that its card does not say."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 1, 0))
    table.add_column("Reward", no_wrap=True)
    for name, width in (("Scores", 6), ("GB", 5), ("Non-commercial", 14)):
        table.add_column(name, width=width)
    table.add_column("What it is", overflow="fold")
    for entry in sorted(entries, key=lambda entry: entry.name):
        table.add_row(*map(Text, (entry.name, *_card(entry))))
    return table


def _card(entry: Entry) -> Sequence[str]:
    card = entry.card
    if card is None:
        return ["-", "-", "-", f"{entry.summary}\nCheckpoint and licence: not given."]
    size = "-" if card.size is None else f"{card.size / 1e9:.3g}"
    limited = {True: "yes", False: "no", None: "-"}[card.non_commercial]
    described = f"{entry.summary}\nCheckpoint: {card.checkpoint}.\nLicence: {card.licence}.\nSource: {card.source}."
    return [", ".join(sorted(card.modalities)) or "any", size, limited, described]
