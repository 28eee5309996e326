"""The comparison as one self-contained page."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from branchtree.report.markup import escape, section, table
from branchtree.studies.compare.collect import Comparison
from branchtree.studies.compare.curves import held_out_charts, training_charts
from branchtree.studies.compare.table import Sheet, reward_sheet, troubles, work_sheet


def render_comparison(comparison: Comparison, title: str, told: str) -> str:
    """The page as text: tables, then curves. It needs nothing beside itself."""
    parts = _parts(comparison)
    contents = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, head, body, _ in parts if body)
    own, report = files("branchtree.studies.compare"), files("branchtree.report")
    styles = [report.joinpath("style.css"), own.joinpath("compare.css")]
    return Template(own.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        style="".join(style.read_text(encoding="utf-8") for style in styles),
        title=escape(title),
        told=escape(told),
        status=_status(comparison),
        notes=_notes(comparison),
        contents=contents,
        body="".join(section(*part) for part in parts),
    )


def _parts(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """(anchor, title, body, lead) of every section."""
    rewards, work = reward_sheet(comparison), work_sheet(comparison)
    several = len(rewards.heads) > 1
    return [
        ("held-out", "Held-out figures", _table("Held-out figures", rewards) if several else "", _HELD_OUT),
        ("held-out-curves", "Held-out curves", held_out_charts(comparison), _CURVES),
        ("training", "Training rewards", training_charts(comparison), _TRAINING),
        ("work", "Work", _table("Work per iteration", work), _WORK),
    ]


_HELD_OUT = (
    "Mean and sample standard deviation over seeds. The last column of each figure is the difference to the first row "
    "after training, paired by seed, with its 95% interval by Student's t."
)
_CURVES = "Means over seeds; bands are one standard deviation. Time is that of the iterations, without evaluation."
_TRAINING = "Mean reward of an iteration's leaves, averaged over seeds; of long runs a running mean."
_WORK = (
    "Means over iterations and runs. Nodes per leaf is what the paper calls NFE. CPU seconds are those of a whole run: "
    "iterations, evaluation and samples, but not loading."
)


def _table(caption: str, sheet: Sheet) -> str:
    return table(
        caption, [escape(head) for head in sheet.heads], [[escape(cell) for cell in row] for row in sheet.rows]
    )


def _status(comparison: Comparison) -> str:
    runs = [run for row in comparison.rows for run in row.runs]
    if comparison.complete:
        return f'<span class="status done">finished: {len(runs)} runs</span>'
    done = sum(run.status == "finished" for run in runs)
    return f'<span class="status open">not finished: {done} of {len(runs)} runs</span>'


def _notes(comparison: Comparison) -> str:
    listed = "".join(f"<li>{escape(trouble)}</li>" for trouble in troubles(comparison))
    return f'<aside class="notes" aria-label="Runs that are not finished"><ul>{listed}</ul></aside>' if listed else ""
