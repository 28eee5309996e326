"""From what each part of a prompt's tree knows to the whole's credit, and from that back to the part's own edges.

``whole`` is the topology of some prompts' trees, ``part`` that of one process's part of each (``tree.grow_parts``); the
parts of all processes together hold every leaf once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from branchtree.core.families import Families
from branchtree.core.parts import TreePart
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology, places_in


def owned_nodes(part: Topology) -> tuple[Tensor, ...]:
    """Per depth (n_d,) bool: which of the nodes that a part holds it owns."""
    return tuple(torch.cat([_owned(each, depth) for each in part.parts]) for depth in part.depths)


def _owned(part: TreePart, depth: int) -> Tensor:
    held, owned = part.held[depth], part.owned[depth]
    nodes = torch.arange(held.start, held.stop)
    return (nodes >= owned.start) & (nodes < owned.stop)


def join_levels(whole: Topology, parts: Sequence[Topology], levels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One number per node (n_d,) of each part as that of each node of the whole, per depth (N_d,), from its owner."""
    joined = [torch.zeros(whole.width(depth)) for depth in whole.depths]
    for part, known in zip(parts, levels, strict=True):
        places, owned = places_in(whole, part.parts), owned_nodes(part)
        for level, here, place, mine in zip(joined, known, places, owned, strict=True):
            level[place[mine]] = here[mine]
    return joined


def join_scores(whole: Topology, parts: Sequence[Topology], scores: Sequence[Scores]) -> Scores:
    """The scores of the parts' leaves in the order of the whole's."""
    places = torch.cat([places_in(whole, part.parts)[-1] for part in parts])
    joined, order = Scores.joined(scores), torch.argsort(places)
    return Scores(
        values=joined.values[order],
        valid=joined.valid[order],
        raw=None if joined.raw is None else joined.raw[order],
        details={name: figure[order] for name, figure in joined.details.items()},
        reasons={int(places[row]): reason for row, reason in joined.reasons.items()},
    )


def own_families(families: Families, whole: Topology, part: Topology) -> Families:
    """Of the whole's families the edges that a part owns, by their places in the part.

    So every edge is trained by one process. A family whose children have several owners is there in each of theirs.
    """
    here = [torch.full((whole.width(depth),), -1) for depth in whole.depths]
    mine = [torch.zeros(whole.width(depth), dtype=torch.bool) for depth in whole.depths]
    for level, flags, place, owned in zip(here, mine, places_in(whole, part.parts), owned_nodes(part), strict=True):
        level[place] = torch.arange(len(place))
        flags[place] = owned
    kept = _looked_up(mine, families.edge_depth, families.child)
    with_edges = torch.unique(families.family[kept])
    chosen = replace(
        families, family=families.family[kept], child=families.child[kept], advantage=families.advantage[kept]
    ).select(with_edges)
    return replace(
        chosen,
        parent=_looked_up(here, chosen.depth, chosen.parent),
        child=_looked_up(here, chosen.edge_depth, chosen.child),
    )


def _looked_up(levels: Sequence[Tensor], depth: Tensor, place: Tensor) -> Tensor:
    """The entry of each (depth, place) in a per-depth list of tensors."""
    starts = torch.tensor([0, *(len(level) for level in levels)]).cumsum(0)
    return torch.cat(list(levels))[starts[depth] + place]
