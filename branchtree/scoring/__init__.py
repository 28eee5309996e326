"""Scoring pictures and videos that lie in files, by any registered reward."""

from branchtree.scoring.results import FileScore, ScoredFile
from branchtree.scoring.run import score_files

__all__ = ["FileScore", "ScoredFile", "score_files"]
