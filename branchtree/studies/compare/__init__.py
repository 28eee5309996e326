"""Several recipes under the same seeds, prompts and budget: what each costs and what it reaches.

A request is planned into runs (``request``, ``budget``, ``runs``), the runs are done (``execute``), and their files
are read into a table and a page (``collect``, ``table``, ``page``).
"""

from branchtree.studies.compare.collect import Comparison
from branchtree.studies.compare.compare import run_comparison
from branchtree.studies.compare.request import Budget, ComparisonRequest, Row

__all__ = ["Budget", "Comparison", "ComparisonRequest", "Row", "run_comparison"]
