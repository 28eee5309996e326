"""The commands. Heavy libraries are imported inside them, so that ``branchtree --help`` answers at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.logging import RichHandler
from rich.table import Table

from branchtree.cli.arguments import ForceOption, OverridesArgument, RecipeArgument, SmokeOption, parse_overrides
from branchtree.cli.compare import compare
from branchtree.cli.console import make_console, replace_unencodable, visible
from branchtree.cli.convert_config import convert_config
from branchtree.cli.diversity import diversity
from branchtree.cli.doctor import doctor
from branchtree.cli.evaluate import evaluate
from branchtree.cli.export import export
from branchtree.cli.score import rewards, score
from branchtree.cli.serve import serve_reward
from branchtree.cli.watch import runs, watch
from branchtree.errors import BranchTreeError

app = typer.Typer(
    name="branchtree",
    help="Train diffusion and flow-matching models with tree-structured reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells give a process which Ctrl-C ended


def main() -> None:
    """Run a command; an expected error is one message on standard error and exit code 2."""
    replace_unencodable()
    try:
        app()
    except BranchTreeError as error:
        make_console(stderr=True, soft_wrap=True).print(f"error: {visible(str(error))}", style="red")
        sys.exit(2)


@app.callback()
def _options(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False) -> None:
    handler = RichHandler(console=make_console(stderr=True), show_path=False, show_time=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("branchtree")
    log.handlers = [handler]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    # It warns at every import of peft that a kernel for inference on a CPU is missing, which nothing here runs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    smoke: SmokeOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory.")] = False,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="With --resume: a key that may have changed; repeatable.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="N", help="With --resume: go on from this iteration's checkpoint.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Start from the weights of a run, a checkpoint, or a LoRA.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's directory; runs/<recipe name> by default.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    force: ForceOption = False,
) -> None:
    """Train a model by a recipe."""
    console = make_console()
    from branchtree.api import train as run
    from branchtree.cli.display import ProgressDisplay, figures_table
    from branchtree.run.directory import RunDirectory

    changes = parse_overrides(overrides or [])
    try:
        with ProgressDisplay(console) as display:
            result = run(
                recipe,
                changes,
                output=output,
                smoke=smoke,
                resume=resume,
                allow=allow or (),
                checkpoint=checkpoint,
                start=start,
                callbacks=[display],
                force=force,
            )
    except KeyboardInterrupt:
        leave_at_once("stopped at once; --resume goes on from the last checkpoint")
    if not result.main_process:
        return
    if result.after:
        console.print(figures_table(result.before or {}, result.after))
    if not result.finished:
        console.print(
            f"Stopped after {result.iterations} iterations; continue with --resume --output {result.output}",
            soft_wrap=True,
        )
        return
    console.print(f"Trained model: {RunDirectory(result.output).final}", soft_wrap=True)
    if report:
        from branchtree.api import write_report

        console.print(f"Report: {write_report(result.output)}", soft_wrap=True)


@app.command()
def plan(recipe: RecipeArgument, overrides: OverridesArgument = None, smoke: SmokeOption = False) -> None:
    """Show a recipe's tree, rows and memory, without loading a model."""
    console = make_console()
    from branchtree.api import plan as make_plan
    from branchtree.cli.display import print_plan

    print_plan(console, make_plan(recipe, parse_overrides(overrides or []), smoke=smoke))


@app.command()
def recipes() -> None:
    """List the recipes that can be named, and the methods that a recipe can be put under, as in RECIPE+METHOD."""
    console = make_console()
    from branchtree.recipe import recipe_names
    from branchtree.recipe.load import METHOD_SIGN, method_names
    from branchtree.recipe.source import read_yaml

    for heading, names, sign in (("Recipe", recipe_names(), ""), ("Method", method_names(), METHOD_SIGN)):
        table = Table(heading, "What it does", box=None, header_style="bold", padding=(0, 2))
        for name, path in names.items():
            table.add_row(f"{sign}{name}", str(read_yaml(path).data.get("description", "")))
        console.print(table)


@app.command()
def plugins() -> None:
    """List installed models, rewards, kinds of samples, callbacks, feature spaces, rules, and plug-ins that fail."""
    console = make_console()
    from branchtree.plugins.registry import registry

    found = registry()
    table = Table("Kind", "Name", "What it is", "From", box=None, header_style="bold", padding=(0, 2))
    kinds = {
        "model": found.models,
        "reward": found.rewards,
        "samples": found.samples,
        "callback": found.callbacks,
        "features": found.features,
        **found.rules,
    }
    for kind, entries in kinds.items():
        for entry in entries.values():
            table.add_row(kind, entry.name, entry.summary, entry.distribution)
    console.print(table)
    for broken in found.broken:
        console.print(str(broken), style="red")


app.command()(doctor)
app.command()(evaluate)
app.command()(export)
app.command()(diversity)
app.command()(compare)
app.command()(score)
app.command()(rewards)
app.command()(convert_config)
app.command()(serve_reward)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show the page to browsers of this machine instead.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: the port; 0 takes a free one.")] = 8770,
) -> None:
    """Write a run's report.html, or serve it while the run trains."""
    console = make_console()
    if serve:
        from branchtree.report.live import LiveReport

        with LiveReport(run, port) as server:
            console.print(f"Report: {server.url} (this machine only; Ctrl-C ends it)", soft_wrap=True)
            server.run()
        return
    from branchtree.api import write_report

    console.print(f"Report: {write_report(run)}", soft_wrap=True)


app.command()(watch)
app.command()(runs)


def leave_at_once(message: str) -> NoReturn:
    """Print a message and end the process as interrupted, without waiting for threads that still score or write."""
    make_console(stderr=True, soft_wrap=True).print(message)
    sys.stdout.flush()
    os._exit(INTERRUPTED)
