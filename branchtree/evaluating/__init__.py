"""Judging a model on held-out prompts: against its base, with intervals, by any rewards."""

from branchtree.evaluating.comparison import Comparison, Interval
from branchtree.evaluating.run import EvaluationResult, evaluate_subject

__all__ = ["Comparison", "EvaluationResult", "Interval", "evaluate_subject"]
