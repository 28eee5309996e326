"""Scoring pictures, videos and samples of other kinds that lie in files, by any registered reward."""

from branchtree.studies.score.run import FileScore, ScoredFile, score_files

__all__ = ["FileScore", "ScoredFile", "score_files"]
