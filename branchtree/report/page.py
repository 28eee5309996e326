"""The page: the order of its sections, its frame, and its file."""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from branchtree.errors import OutputError
from branchtree.report import sections
from branchtree.report.curves import depth_charts, reward_charts, signal_charts
from branchtree.report.markup import escape, section
from branchtree.report.read import Run, read_run
from branchtree.report.samples import samples
from branchtree.report.tree_figure import tree_figures

NAME = "report.html"
MARK = '<p class="kicker">Run report'
"""A text of the template that no other page has."""


def write_page(run: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    The page is one self-contained file with pictures, plots and styles. For a run that is in progress or was killed it
    shows what was written so far. Raises OutputError if the directory is no run or cannot be written to.
    """
    run = Path(run)
    page = render_report(read_run(run))
    target = run / NAME
    if target.exists() and not _is_report(target):
        raise OutputError(f"{target}: is no report that was written by branchtree; give it another name")
    try:
        _replace(target, page)
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {error.strerror}; make the directory writable and free some space"
        ) from None
    return target


def _is_report(path: Path) -> bool:
    try:
        return MARK in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def render_report(run: Run) -> str:
    """Return the page as text."""
    shown = [(name, title, body, lead) for name, title, body, lead in _contents(run) if body]
    contents = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _, _ in shown)
    resources = files("branchtree.report")
    title = escape(run.setting("name") or "Unnamed run")
    description = run.setting("description")
    return Template(resources.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        style=resources.joinpath("style.css").read_text(encoding="utf-8"),
        title=title,
        description=f'<p class="description">{escape(description)}</p>' if description else "",
        status=sections.status(run),
        facts=sections.facts(run),
        notes=sections.notes(run),
        contents=contents,
        key_numbers=sections.key_numbers(run),
        body="".join(section(*one) for one in shown),
    )


def _contents(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (anchor, title, body, lead) of every section; those without a body are not shown."""
    nothing = "" if run.metrics else '<p class="missing">No iteration has finished yet.</p>'
    return [
        ("held-out", "Held-out figures", sections.evaluation(run), _HELD_OUT),
        ("rewards", "Training rewards", nothing or reward_charts(run), _REWARDS),
        ("failures", "Samples that could not be scored", sections.failures(run), _FAILURES),
        ("samples", "Samples", samples(run), _SAMPLES),
        ("trees", "Recorded trees", tree_figures(run), _TREES),
        ("credit", "Credit by split", sections.credit(run), _CREDIT),
        ("depths", "Credit by depth", depth_charts(run), ""),
        ("signals", "Update signals", signal_charts(run), ""),
        ("time", "Time", sections.timing(run), ""),
        ("details", "Details", sections.metrics(run) + sections.recipe(run), ""),
    ]


_HELD_OUT = "Means over samples of prompts that are not trained on, from the same noises each time."
_REWARDS = "Rewards of the leaves of each iteration's trees; prompts differ from one iteration to the next."
_FAILURES = "They are masked: no gradient comes from them. All that the log names are in failures.jsonl."
_SAMPLES = "Grids start from the same noises, in the same order."
_TREES = (
    "Noise is on the left and the finished samples are on the right. A node's colour is its advantage, the number "
    "before a node is the fused value of the leaves below it."
)
_CREDIT = (
    "How much of the variance of the rewards within a prompt arises between the children of each split, beside the "
    "share that the split would have if all leaves were independent. A ratio above 1 marks a split that decides "
    "more than its number of branches explains."
)


def _replace(target: Path, text: str) -> None:
    """Replace the page by a finished one, so that a reader sees the old page or the new one, never half of one."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(name).chmod(0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
