"""Several recipes under the same seeds, prompts and budget: what each costs and what it reaches.

A request (``request``) is planned into runs (``plan``), the runs are done (``execute``), and their files are read into
figures (``results``), a table and a page (``table``, ``page``); ``run`` is the order of all that.
"""

from branchtree.studies.compare.request import Budget, ComparisonRequest, Row
from branchtree.studies.compare.results import Comparison, Difference, HeldOut, RowFigures, RunFigures, SeedSpread
from branchtree.studies.compare.run import run_comparison

__all__ = [
    "Budget",
    "Comparison",
    "ComparisonRequest",
    "Difference",
    "HeldOut",
    "Row",
    "RowFigures",
    "RunFigures",
    "SeedSpread",
    "run_comparison",
]
