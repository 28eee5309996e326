"""Scoring pictures and videos that lie in files, by any registered reward."""

from branchtree.studies.score.results import FileScore, ScoredFile
from branchtree.studies.score.run import score_files

__all__ = ["FileScore", "ScoredFile", "score_files"]
