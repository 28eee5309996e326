"""A self-contained HTML page about a run: held-out figures, training curves, samples and recorded trees."""

from branchtree.report.page import write_page

__all__ = ["write_page"]
