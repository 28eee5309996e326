"""The edges that are trained, grouped by parent: one forward of a parent's state scores all its edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from branchtree.core.advantages import Advantages
from branchtree.core.gate import open_rows
from branchtree.core.gathering import looked_up, owned_indices
from branchtree.core.pruning import EdgeMask
from branchtree.core.transfer import fetch_rows, send
from branchtree.core.tree import BranchTree, Topology


@dataclass(frozen=True)
class Families:
    """F parents with at least one trained edge, ordered by depth, and their E edges, ordered by family."""

    depth: Tensor  # (F,) int64, of the parent
    parent: Tensor  # (F,) int64, index of the parent among the nodes of its depth
    prompt: Tensor  # (F,) int64
    family: Tensor  # (E,) int64, which of the F families the edge belongs to
    child: Tensor  # (E,) int64, index of the child among the nodes of the depth after
    advantage: Tensor  # (E,) float32
    gate: Tensor | None = None  # (E,) float32, how far a KL term acts on the edge; without a gate on all alike

    def __len__(self) -> int:
        return self.depth.numel()

    @property
    def edges(self) -> int:
        """E."""
        return self.family.numel()

    @property
    def edge_depth(self) -> Tensor:
        """Depth of each edge's child, (E,)."""
        return self.depth[self.family] + 1

    @property
    def gated(self) -> Tensor:
        """The families with an edge that a KL term acts on, ascending; the first where there is none."""
        return torch.arange(len(self)) if self.gate is None else open_rows(self.family, self.gate)

    def select(self, index: Tensor) -> Families:
        """Some of the families, ``index`` (F',) ascending."""
        renumbered = torch.full((len(self),), -1).scatter_(0, index, torch.arange(index.numel()))
        edges = renumbered[self.family] >= 0
        return Families(
            depth=self.depth[index],
            parent=self.parent[index],
            prompt=self.prompt[index],
            family=renumbered[self.family][edges],
            child=self.child[edges],
            advantage=self.advantage[edges],
            gate=None if self.gate is None else self.gate[edges],
        )

    def within(self, topology: Topology, first: int) -> Families:
        """Return the families of prompts ``first`` and after, collected from them alone, by their indices among all.

        ``topology`` is that of all prompts.
        """
        starts = torch.tensor([topology.span(first, depth).start for depth in topology.depths])
        return replace(
            self,
            parent=self.parent + starts[self.depth],
            prompt=self.prompt + first,
            child=self.child + starts[self.edge_depth],
        )

    def owned(self, whole: Topology, share: Topology) -> Families:
        """Return those edges of the whole's families that a share owns, by their indices in the share.

        So every edge is trained by one process. A family whose children have several owners is there in each of theirs.
        """
        here, mine = owned_indices(whole, share)
        kept = looked_up(mine, self.edge_depth, self.child)
        chosen = replace(
            self,
            family=self.family[kept],
            child=self.child[kept],
            advantage=self.advantage[kept],
            gate=None if self.gate is None else self.gate[kept],
        ).select(torch.unique(self.family[kept]))
        return replace(
            chosen,
            parent=looked_up(here, chosen.depth, chosen.parent),
            child=looked_up(here, chosen.edge_depth, chosen.child),
        )


def trained_edges(topology: Topology, advantages: Advantages, keep: EdgeMask, regularised: bool = False) -> EdgeMask:
    """Kept edges with an advantage: an edge of advantage 0 has no gradient and costs no compute.

    Under a KL term, ``regularised``, all kept edges: it pulls the policy back wherever it was followed, whatever the
    rewards are there, also above a leaf whose reward failed.
    """
    if regularised:
        return keep
    return tuple(mask & (advantage != 0) for mask, advantage in zip(keep, advantages, strict=True))


def collect_families(topology: Topology, advantages: Advantages, keep: EdgeMask, regularised: bool = False) -> Families:
    """Gather the trained edges of a tree into families; ``regularised`` as in ``trained_edges``."""
    none = torch.zeros(0, dtype=torch.int64)
    levels = [Families(none, none, none, none, none, none.float())]
    families = 0
    for below, edges in enumerate(trained_edges(topology, advantages, keep, regularised)):
        children = torch.nonzero(edges)[:, 0]
        parents, family = torch.unique(topology.parent[below][children], return_inverse=True)
        if parents.numel() > 0:  # roots have no edge, so from here on there is a depth above
            level = Families(
                depth=torch.full_like(parents, below - 1),
                parent=parents,
                prompt=topology.root[below - 1][parents],
                family=family + families,
                child=children,
                advantage=advantages[below][children].float(),
            )
            levels.append(level)
            families += parents.numel()
    names = [field.name for field in fields(Families) if field.name != "gate"]
    return Families(**{name: torch.cat([getattr(level, name) for level in levels]) for name in names})


@dataclass(frozen=True)
class FamilyBatch:
    """What one forward of F parents needs, on the device."""

    families: Families
    latents: Tensor  # (F, *latent)
    sigma: Tensor  # (F,)
    following: Tensor  # (E, *latent)
    log_prob: Tensor  # (E,) of the rollout
    family: Tensor  # (E,)
    advantage: Tensor  # (E,)
    active: Tensor  # (F,) the noise of the parent's step over the kernel's own, as a Kernel gets it; CPU
    target: Tensor  # (F,) the depth that the step leads to; CPU


def gather(tree: BranchTree, families: Families, device: torch.device) -> FamilyBatch:
    """Fetch the states that some families need from the tree."""
    steps = list(zip(families.prompt.tolist(), families.depth.tolist(), strict=True))
    plans = tree.topology.plans
    return FamilyBatch(
        families=families,
        latents=rows_at(tree.states, families.depth, families.parent, device),
        sigma=send(tree.sigmas[families.depth], device),
        following=rows_at(tree.states, families.edge_depth, families.child, device),
        log_prob=rows_at(tree.log_prob, families.edge_depth, families.child, device),
        family=send(families.family, device),
        advantage=send(families.advantage, device),
        active=torch.tensor([plans[prompt].active(depth) for prompt, depth in steps]),
        target=torch.tensor([plans[prompt].target[depth] for prompt, depth in steps], dtype=torch.int64),
    )


def rows_at(levels: Sequence[Tensor], depth: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Return rows of a per-depth list of tensors on the device, ``depth`` ascending."""
    depths, counts = torch.unique_consecutive(depth, return_counts=True)
    chosen = index.split(counts.tolist())
    return torch.cat([fetch_rows(levels[int(d)], rows, device) for d, rows in zip(depths, chosen, strict=True)])
