"""The training rewards of a run as one picture."""

from __future__ import annotations

import io

from branchtree.report.curves import reward_labels, smoothed, values
from branchtree.report.read import Run

WIDTH, HEIGHT = 6.7, 2.4  # inches, of one reward
COLOUR, FAINT = "#2a6fb0", 0.35


def reward_curve(run: Run) -> bytes | None:
    """Return a PNG with the mean of each reward over the iterations; None where nothing was logged."""
    labels = reward_labels(run.metrics)
    if not labels:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = values(run.metrics, "iteration")
    written = io.BytesIO()
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(labels)), layout="constrained")
        for axes, label in zip(figure.subplots(len(labels), squeeze=False)[:, 0], labels, strict=True):
            means = values(run.metrics, f"reward/{label}/mean")
            marker = "o" if len(x) <= 30 else ""
            axes.plot(x, means, color=COLOUR, alpha=FAINT, linewidth=0.9)
            axes.plot(x, smoothed(means), color=COLOUR, linewidth=1.6, marker=marker, markersize=3)
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("iteration")
        figure.savefig(written, format="png", dpi=110, metadata={"Software": None})
    return written.getvalue()
