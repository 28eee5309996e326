"""Judging a model on held-out prompts: against its base, with intervals, by any rewards."""

from branchtree.studies.evaluate.comparison import Interval, RewardComparison
from branchtree.studies.evaluate.run import EvaluationResult, evaluate_subject

__all__ = ["EvaluationResult", "Interval", "RewardComparison", "evaluate_subject"]
