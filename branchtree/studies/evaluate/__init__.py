"""Judging a model on held-out prompts: against its base, with intervals, by any rewards."""

from branchtree.studies.evaluate.comparison import Comparison, Interval
from branchtree.studies.evaluate.run import EvaluationResult, evaluate_subject

__all__ = ["Comparison", "EvaluationResult", "Interval", "evaluate_subject"]
