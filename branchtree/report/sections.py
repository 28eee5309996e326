"""The sections of the page that are text and tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from branchtree.report.curves import evaluation_charts, evaluation_labels, keys, mean
from branchtree.report.markup import ARROW, MISSING, bar, duration, escape, number, percent, signed, table
from branchtree.report.read import Evaluation, LoggedFigure, LogRow, Run, finite

REASONS, EXAMPLES = 20, 10
"""The most rows of the tables of failures."""
CALL = "the whole call"


def status(run: Run) -> str:
    """Return whether the run finished, and how many iterations it did."""
    of = f"{run.done} of {run.planned}" if run.planned is not None else str(run.done)
    if run.state == "running":
        return f'<span class="status open">running: {escape(of)} iterations</span>'
    if run.summary is None:
        return f'<span class="status open">not finished: {escape(of)} iterations</span>'
    iterations = finite(run.summary.get("iterations"))
    count = number(run.done if iterations is None else iterations)
    return f'<span class="status done">finished: {count} iterations</span>'


def facts(run: Run) -> str:
    """Return a list of facts: model, time, device, rows, tree and seed."""
    summary = run.summary or {}
    seconds = finite(summary.get("seconds"))
    if seconds is None:
        seconds = sum(row.get("total") or 0.0 for row in run.timing) or None
    rows = [row["rows/total"] for row in run.metrics if row.get("rows/total") is not None]
    pairs = [
        ("Model", run.setting("model", "adapter")),
        ("Time", duration(seconds) if seconds else None),
        ("Device", summary.get("device")),
        ("Row equivalents", number(rows[-1]) if rows else None),
        ("Tree", _tree_shape(run)),
        ("Seed", run.setting("seed")),
    ]
    shown = (f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs if value is not None)
    return f'<dl class="facts">{"".join(shown)}</dl>'


def _tree_shape(run: Run) -> str | None:
    steps, splits = run.setting("tree", "steps"), run.setting("tree", "splits")
    if steps is None:
        return None
    at = ", ".join(str(step) for step in splits) if isinstance(splits, list) else splits
    return f"{steps} steps, splits {MISSING if at is None else at}"


def key_numbers(run: Run) -> str:
    """Return cards of held-out figures before and after, or of training rewards if nothing was held out."""
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        cards = [_card(label, first, last) for label in evaluation_labels([first, last])]
    else:
        cards = [_training_card(run.metrics, key) for key in keys(run.metrics, "reward/", ".+/mean")]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(label: str, first: Evaluation, last: Evaluation) -> str:
    before, after = (evaluation.figures.get(label, LoggedFigure()) for evaluation in (first, last))
    if first is last:
        return _key_number(label, number(before.mean), "", f"held out, after {first.iteration} iterations")
    change = _change(before, after)
    caption = f"held out, iteration {first.iteration} {ARROW} {last.iteration}"
    return _key_number(label, f"{number(before.mean)} {ARROW} <b>{number(after.mean)}</b>", signed(change), caption)


def _training_card(metrics: Sequence[LogRow], key: str) -> str:
    count = max(len(metrics) // 10, 1)
    before, after = mean(metrics[:count], key), mean(metrics[-count:], key)
    change = None if before is None or after is None else after - before
    label = key.removeprefix("reward/").removesuffix("/mean")
    ends = "first and last iteration" if count == 1 else f"first and last {count} iterations"
    caption = f"training reward, mean of the {ends}"
    return _key_number(label, f"{number(before)} {ARROW} <b>{number(after)}</b>", signed(change), caption)


def _key_number(label: str, figures: str, change: str, caption: str) -> str:
    delta = f'<p class="change"><span class="hidden">change </span>{change}</p>' if change else ""
    shown = f'<p class="big">{figures}</p>{delta}<p class="caption">{caption}</p>'
    return f'<div class="card"><h3>{escape(label)}</h3>{shown}</div>'


def evaluation(run: Run) -> str:
    """Return the held-out figures over time, as a table and, where there are enough, as curves."""
    labels = evaluation_labels(run.evaluations)
    if not labels:
        return ""
    heads, columns = ["Iterations done"], []
    for label in labels:
        figures = [entry.figures.get(label, LoggedFigure()) for entry in run.evaluations]
        heads.append(escape(label))
        columns.append([*(number(figure.mean) for figure in figures), signed(_change(figures[0], figures[-1]))])
        if any(figure.valid != figure.samples for figure in figures):
            heads.append("valid samples")
            columns.append([*(_validity(figure) for figure in figures), ""])
    names = [*(number(entry.iteration) for entry in run.evaluations), "Change"]
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    several = len(run.evaluations) > 1
    means = table("Means over valid samples", heads, rows if several else rows[:-1], "total" if several else "")
    return means + evaluation_charts(run.evaluations)


def _change(before: LoggedFigure, after: LoggedFigure) -> float | None:
    return None if before.mean is None or after.mean is None else after.mean - before.mean


def _validity(figure: LoggedFigure) -> str:
    if figure.valid is None or figure.samples is None:
        return MISSING
    return f"{number(figure.valid)} of {number(figure.samples)}"


def timing(run: Run) -> str:
    """Return the time of all phases, as a bar and a table."""
    phases = [key for key in keys(run.timing) if key not in ("iteration", "total")]
    sums = {phase: sum(row.get(phase) or 0.0 for row in run.timing) for phase in phases}
    whole = sum(sums.values())
    if whole <= 0:
        return ""
    shares = [(index % 6, phase, sums[phase] / whole) for index, phase in enumerate(phases)]
    stack = "".join(f'<span class="c{c}" style="width:{100 * share:.2f}%"></span>' for c, _, share in shares)
    rows = [
        [escape(phase), bar(share, c), duration(sums[phase]), duration(sums[phase] / len(run.timing))]
        for c, phase, share in shares
    ]
    rows.append(["All", percent(1.0), duration(whole), duration(whole / len(run.timing))])
    heads = ["Phase", "Share", "Total", "Per iteration"]
    name = f"Time per phase over {len(run.timing)} iterations"
    return f'<div class="stack" aria-hidden="true">{stack}</div>{table(name, heads, rows, "total")}'


def credit(run: Run) -> str:
    """Return a table by split: the share of the rewards' variance, beside the share if leaves were independent."""
    found = [re.fullmatch(r"variance/share/split_(\d+)", key) for key in keys(run.metrics)]
    splits = sorted((match[1] for match in found if match), key=int)
    if not splits:
        return ""
    steps = _steps_of(run, splits)
    rows = []
    for split, step in zip(splits, steps, strict=True):
        share, independent, component, spread = (
            mean(run.metrics, f"{kind}/split_{split}")
            for kind in ("variance/share", "variance/independent_share", "variance/component", "spread")
        )
        ratio = share / independent if share is not None and independent else None
        name = f"{split}{step}"
        rows.append([name, bar(share), bar(independent, 1), number(ratio, 3), percent(component), number(spread, 3)])
    heads = ["Split", "Variance share", "If independent", "Ratio", "Component", "Spread"]
    empty = [column for column in (4, 5) if all(row[column] == MISSING for row in rows)]
    kept = [[cell for column, cell in enumerate(row) if column not in empty] for row in (heads, *rows)]
    return table(f"Credit by split, mean over {len(run.metrics)} iterations", kept[0], kept[1:])


def _steps_of(run: Run, splits: Sequence[str]) -> list[str]:
    """Return the step of each numbered split as HTML, if all recorded trees agree, or else empty texts."""
    recorded = {tree.splits for tree in run.trees}
    if len(recorded) == 1 and [int(split) for split in splits] == list(range(len(steps := next(iter(recorded))))):
        return [f" <small>step {step}</small>" for step in steps]
    return ["" for _ in splits]


def failures(run: Run) -> str:
    """Return tables of samples that could not be scored: counts by reward and reason, and the last named ones."""
    counts: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], int] = {}
    for one in run.failures:
        for reason, count in one.reasons.items() if one.more is not None else [(one.reason, 1)]:
            counts[one.reward, reason] += count
            last[one.reward, reason] = one.iteration
    if not counts:
        return ""
    rows = [
        [escape(reward or CALL), escape(reason), number(count), number(last[reward, reason])]
        for (reward, reason), count in counts.most_common(REASONS)
    ]
    hidden = f", the {REASONS} most frequent of {len(counts)}" if len(counts) > REASONS else ""
    reasons = table(f"Failures by reason{hidden}", ["Reward", "Reason", "Count", "Last iteration"], rows)
    named = [one for one in run.failures if one.leaf is not None][-EXAMPLES:]
    heads = ["Iteration", "Prompt", "Leaf", "Reward", "Reason"]
    examples = [
        [number(one.iteration), *map(escape, (one.prompt, one.leaf, one.reward, one.reason))] for one in reversed(named)
    ]
    return reasons + (table(f"The last {len(named)} that are named", heads, examples) if named else "")


def metrics(run: Run) -> str:
    """Return a folded table of every metric."""
    rows = []
    for key in keys(run.metrics):
        series = [value for row in run.metrics if (value := row.get(key)) is not None]
        if key != "iteration":
            ends = (series[0], series[-1], min(series), max(series))
            rows.append([f"<code>{escape(key)}</code>", *(number(value) for value in ends)])
    if not rows:
        return ""
    heads = ["Metric", "First", "Last", "Least", "Largest"]
    return f"<details><summary>All {len(rows)} metrics</summary>{table('All metrics', heads, rows)}</details>"


def recipe(run: Run) -> str:
    """Return the resolved recipe, folded."""
    text = f'<pre tabindex="0"><code>{escape(run.recipe_text)}</code></pre>'
    return f"<details><summary>Resolved recipe</summary>{text}</details>"


def alarms(run: Run) -> str:
    """Return a box of the alarms that were raised."""
    if not run.alarms:
        return ""
    listed = "".join(f"<li>Iteration {alarm.iteration}: {escape(alarm.message)}.</li>" for alarm in run.alarms)
    return f'<aside class="alarms" aria-label="Alarms"><h2>Alarms</h2><ul>{listed}</ul></aside>'


def notes(run: Run) -> str:
    """Return notes about what could not be read."""
    if not run.notes:
        return ""
    listed = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return f'<aside class="notes" aria-label="Notes on the files of this run"><ul>{listed}</ul></aside>'
