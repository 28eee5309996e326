"""One self-contained page about a run: what it reached, how it trained, what it sampled, and how its trees looked."""

from branchtree.report.page import write_page

__all__ = ["write_page"]
