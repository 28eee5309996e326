"""The pictures of recorded trees' leaves, of which only as many move as fit on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from branchtree.report.images import Picture, embed
from branchtree.report.read import Run, Tree
from branchtree.run.directory import TREES

LONGEST = 160  # pixels
MOVING_BYTES = 4 * 1024**2  # of all animations on the page

Thumbnails = Mapping[int, Picture]
"""The thumbnails of one tree, by node."""


def read_thumbnails(run: Run, trees: Sequence[Tree]) -> list[Thumbnails]:
    """Return the readable pictures of each tree's leaves; earlier trees get stills if all animations are too large."""
    return within([_embedded(run, tree) for tree in trees], MOVING_BYTES)


def within(trees: Sequence[Thumbnails], most: int) -> list[Thumbnails]:
    """Give earlier trees stills only, so that the animations of the others have at most ``most`` bytes."""
    left, kept = most, list(trees)
    for index in reversed(range(len(trees))):
        left -= sum(len(picture.uri) for picture in trees[index].values() if picture.still is not None)
        if left < 0:
            kept[index] = {node: _stilled(picture) for node, picture in trees[index].items()}
    return kept


def _embedded(run: Run, tree: Tree) -> Thumbnails:
    folder = run.path / TREES
    found = {leaf.node: embed(folder / leaf.thumbnail, run.path, LONGEST) for leaf in tree.leaves if leaf.thumbnail}
    return {node: picture for node, picture in found.items() if picture is not None}


def _stilled(picture: Picture) -> Picture:
    return picture if picture.still is None else replace(picture, uri=picture.still, still=None)
