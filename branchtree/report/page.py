"""The page: the order of its sections, its frame, and its file."""

from __future__ import annotations

from pathlib import Path

from branchtree.errors import OutputError
from branchtree.files.writing import write_atomically
from branchtree.report import sections
from branchtree.report.curves import depth_charts, reward_charts, signal_charts
from branchtree.report.markup import Titled, escape, fill_page
from branchtree.report.read import Run, read_run
from branchtree.report.samples import samples
from branchtree.report.tree_figure import tree_figures
from branchtree.run.directory import FAILURES

NAME = "report.html"
KICKER = "Run report"
MARK = f'<p class="kicker">{KICKER}'
"""What this page has, and no other."""


def write_page(run: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    The page is one self-contained file with pictures, plots and styles. For a run that is in progress or was killed it
    shows what was written so far. Raises OutputError if the directory is no run or cannot be written to.
    """
    run = Path(run)
    text = render_report(read_run(run))
    target = run / NAME
    if target.exists() and not _is_report(target):
        raise OutputError(f"{target}: is no report that was written by branchtree; give it another name")
    try:
        write_atomically(target, text.encode())
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
    description = run.setting("description")
    head = [
        f'<p class="description">{escape(description)}</p>' if description else "",
        sections.alarms(run),
        sections.key_numbers(run),
        sections.facts(run),
        sections.notes(run),
    ]
    return fill_page(
        kicker=KICKER,
        title=run.setting("name") or "Unnamed run",
        status=sections.status(run),
        head="\n".join(head),
        sections=_sections(run),
        origin="the files of the run",
        sources="img-src data:; media-src data:; ",
    )


def _sections(run: Run) -> list[Titled]:
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
_FAILURES = f"They are masked: no gradient comes from them. All that the log names are in {FAILURES}."
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
