"""From what each share of a prompt's tree knows to the whole's credit, and back to the share's own edges.

``whole`` is the topology of some prompts' trees, ``share`` that of one process's share of each (``tree.grow_shares``);
the shares of all processes together hold every leaf once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.core.sharing import TreeShare
from branchtree.core.tree import Topology, indices_in


def owned_nodes(share: Topology) -> tuple[Tensor, ...]:
    """Return, per depth (n_d,) bool, which of the nodes that a share holds it owns."""
    return tuple(torch.cat([_owned(each, depth) for each in share.shares]) for depth in share.depths)


def _owned(share: TreeShare, depth: int) -> Tensor:
    held, owned = share.held[depth], share.owned[depth]
    nodes = torch.arange(held.start, held.stop)
    return (nodes >= owned.start) & (nodes < owned.stop)


def gather_levels(whole: Topology, shares: Sequence[Topology], levels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return one number per node of the whole, per depth (N_d,), each from the share that owns the node.

    ``levels`` holds, for each share, one number per node that it holds, per depth (n_d,).
    """
    gathered = [torch.zeros(whole.width(depth)) for depth in whole.depths]
    for share, known in zip(shares, levels, strict=True):
        indices, owned = indices_in(whole, share.shares), owned_nodes(share)
        for level, here, index, mine in zip(gathered, known, indices, owned, strict=True):
            level[index[mine]] = here[mine]
    return gathered


def gather_scores(whole: Topology, shares: Sequence[Topology], scores: Sequence[Scores]) -> Scores:
    """Return the scores of the shares' leaves in the order of the whole's leaves."""
    leaves = torch.cat([indices_in(whole, share.shares)[-1] for share in shares])
    return Scores.concatenate(scores).rows(torch.argsort(leaves))


def owned_indices(whole: Topology, share: Topology) -> tuple[list[Tensor], list[Tensor]]:
    """Return, per depth and by node of the whole, the node's index in a share (-1 where it is not), and who owns it.

    The second are flags (N_d,): whether the share owns the node, so that every node is one share's.
    """
    here = [torch.full((whole.width(depth),), -1) for depth in whole.depths]
    mine = [torch.zeros(whole.width(depth), dtype=torch.bool) for depth in whole.depths]
    indices = indices_in(whole, share.shares)
    for level, flags, index, owned in zip(here, mine, indices, owned_nodes(share), strict=True):
        level[index] = torch.arange(len(index))
        flags[index] = owned
    return here, mine


def looked_up(levels: Sequence[Tensor], depth: Tensor, index: Tensor) -> Tensor:
    """Return the entry of each (depth, index) in a per-depth list of tensors."""
    starts = torch.tensor([0, *(len(level) for level in levels)]).cumsum(0)
    return torch.cat(list(levels))[starts[depth] + index]
