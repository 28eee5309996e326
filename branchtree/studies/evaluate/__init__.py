"""Judging a model on held-out prompts: against its base, with intervals, by any rewards."""

from branchtree.studies.evaluate.figures import Interval, RewardComparison
from branchtree.studies.evaluate.request import EvaluationChoices
from branchtree.studies.evaluate.run import EvaluationResult, evaluate_subject

__all__ = ["EvaluationChoices", "EvaluationResult", "Interval", "RewardComparison", "evaluate_subject"]
