"""How different the samples of branched and plain rollouts are, and how different those of one prompt."""

from branchtree.studies.diversity.blocks import BlockInterval
from branchtree.studies.diversity.figures import Discrepancy, DistanceSpread
from branchtree.studies.diversity.mmd import Kid
from branchtree.studies.diversity.request import DiversityChoices, make_diversity_request
from branchtree.studies.diversity.run import GroupRow, Study, run_study

__all__ = [
    "BlockInterval",
    "Discrepancy",
    "DistanceSpread",
    "DiversityChoices",
    "GroupRow",
    "Kid",
    "Study",
    "make_diversity_request",
    "run_study",
]
