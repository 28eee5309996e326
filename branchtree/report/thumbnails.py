"""The pictures of recorded trees' leaves, and how many of them may move before a page grows too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from branchtree.report.images import Picture, embed
from branchtree.report.read import Run, Tree
from branchtree.run.directory import TREES

LONGEST = 160  # pixels
MOVING_BYTES = 4 * 1024**2  # of the page, for animations

Thumbnails = Mapping[int, Picture]
"""The thumbnails of one tree, by node."""


def read_thumbnails(run: Run, trees: Sequence[Tree]) -> list[Thumbnails]:
    """The pictures of each tree's leaves, those that can be read; earlier trees are at rest if all are too much."""
    return within([_embedded(run, tree) for tree in trees], MOVING_BYTES)


def within(trees: Sequence[Thumbnails], most: int) -> list[Thumbnails]:
    """Put whole trees at rest, so that the animations of the last ones have at most ``most`` bytes."""
    left, kept = most, list(trees)
    for place in reversed(range(len(trees))):
        left -= sum(len(picture.uri) for picture in trees[place].values() if picture.still is not None)
        if left < 0:
            kept[place] = {node: _at_rest(picture) for node, picture in trees[place].items()}
    return kept


def _embedded(run: Run, tree: Tree) -> Thumbnails:
    folder = run.path / TREES
    found = {leaf.node: embed(folder / leaf.thumbnail, run.path, LONGEST) for leaf in tree.leaves if leaf.thumbnail}
    return {node: picture for node, picture in found.items() if picture is not None}


def _at_rest(picture: Picture) -> Picture:
    return picture if picture.still is None else replace(picture, uri=picture.still, still=None)
