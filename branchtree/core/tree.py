"""The branching tree of one batch of prompts, as flat arrays.

Axis letters: P prompts, L leaves, N_d nodes at depth d (all prompts together). Nodes of a depth are ordered by
prompt, then by parent, then by place among siblings, so a prompt's nodes and a parent's children are contiguous.
Prompts may branch at different steps: the arrays are ragged in d and never padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from branchtree.core.parts import TreePart
from branchtree.core.schedule import TreePlan

NO_PARENT = -1
"""Parent index of a root."""


@dataclass(frozen=True)
class Topology:
    """Who descends from whom. All index arrays live on the CPU."""

    plans: tuple[TreePlan, ...]  # P
    parent: tuple[Tensor, ...]  # per depth (N_d,) int64, into the depth before
    root: tuple[Tensor, ...]  # per depth (N_d,) int64, which prompt
    parts: tuple[TreePart, ...]  # P: which of each prompt's nodes are here; all of them but where a tree is split

    @property
    def steps(self) -> int:
        """T, the number of transitions; leaves are at this depth."""
        return len(self.parent) - 1

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.plans)

    @property
    def depths(self) -> range:
        """0 to T."""
        return range(self.steps + 1)

    def width(self, depth: int) -> int:
        """N_d."""
        return self.parent[depth].numel()

    def evaluated(self, depth: int, prompts: range | None = None) -> Tensor:
        """The nodes of a depth that go through the denoiser, ascending; those of some adjoining prompts, or all."""
        here = self.block(range(self.prompts) if prompts is None else prompts, depth)
        walked = torch.tensor([depth not in plan.skipped for plan in self.plans])
        return torch.nonzero(walked[self.root[depth][here.start : here.stop]])[:, 0] + here.start

    def target(self, depth: int) -> Tensor:
        """The depth that each node of a depth is led to, (N_d,) int64."""
        return torch.tensor([plan.target[depth] for plan in self.plans])[self.root[depth]]

    @property
    def rollout_rows(self) -> int:
        """Nodes that go through the denoiser, at all depths."""
        return sum(
            len(part.held[depth]) for part in self.parts for depth in self.depths[:-1] if depth not in part.plan.skipped
        )

    @property
    def leaf_root(self) -> Tensor:
        """Each leaf's prompt, (L,)."""
        return self.root[-1]

    @cached_property
    def ancestor(self) -> tuple[Tensor, ...]:
        """Per depth (L,) int64: each leaf's ancestor among that depth's nodes."""
        chain = [torch.arange(self.width(self.steps))]
        for depth in range(self.steps, 0, -1):
            chain.append(self.parent[depth][chain[-1]])
        return tuple(reversed(chain))

    def unbranched(self, depth: int) -> bool:
        """Whether every node of a depth has exactly one child, and so shares its child's place and its leaves."""
        return depth < self.steps and self.width(depth) == self.width(depth + 1)

    def per_edge(self, step: int, flags: Sequence[bool] | Sequence[int]) -> Tensor:
        """Spread one value per prompt over the edges of a step: (N_{step+1},)."""
        return torch.tensor(flags)[self.root[step + 1]]

    def stochastic(self, step: int) -> Tensor:
        """Which nodes of depth ``step`` take a stochastic step, (N_step,) bool."""
        return torch.tensor([plan.stochastic[step] for plan in self.plans])[self.root[step]]

    def span(self, prompt: int, depth: int) -> range:
        """Where a prompt's nodes lie among those of a depth."""
        start = sum(len(part.held[depth]) for part in self.parts[:prompt])
        return range(start, start + len(self.parts[prompt].held[depth]))

    def block(self, prompts: range, depth: int) -> range:
        """Where the nodes of some adjoining prompts lie among those of a depth."""
        return range(self.span(prompts[0], depth).start, self.span(prompts[-1], depth).stop)

    def first(self, prompts: int) -> Topology:
        """That of the first prompts alone, whose nodes keep their places."""
        widths = [self.block(range(prompts), depth).stop for depth in self.depths]
        return Topology(
            plans=self.plans[:prompts],
            parent=tuple(level[:width] for level, width in zip(self.parent, widths, strict=True)),
            root=tuple(level[:width] for level, width in zip(self.root, widths, strict=True)),
            parts=self.parts[:prompts],
        )


def grow(plans: Sequence[TreePlan]) -> Topology:
    """The topology that the plans fix. Raises ValueError unless all have the same number of steps."""
    if not plans:
        raise ValueError("a tree needs at least one prompt")
    if len({plan.steps for plan in plans}) != 1:
        raise ValueError("all prompts of a tree must have the same number of steps")
    root = torch.arange(len(plans))
    parents, roots = [torch.full((len(plans),), NO_PARENT)], [root]
    for step in range(plans[0].steps):
        children = torch.tensor([plan.factors[step] for plan in plans])[root]
        parents.append(torch.repeat_interleave(torch.arange(root.numel()), children))
        root = root[parents[-1]]
        roots.append(root)
    parts = tuple(TreePart.whole(plan) for plan in plans)
    return Topology(plans=tuple(plans), parent=tuple(parents), root=tuple(roots), parts=parts)


def grow_parts(parts: Sequence[TreePart]) -> Topology:
    """The topology of one part of each prompt's tree, with the nodes of the whole that it holds, in their order."""
    whole = grow([part.plan for part in parts])
    if all(part.is_whole for part in parts):
        return whole
    parents, roots, here = [], [], torch.tensor([NO_PARENT])
    for depth, places in enumerate(places_in(whole, parts)):
        parents.append(here[whole.parent[depth][places]])
        roots.append(whole.root[depth][places])
        here = torch.full((whole.width(depth),), NO_PARENT).scatter_(0, places, torch.arange(len(places)))
    return Topology(plans=whole.plans, parent=tuple(parents), root=tuple(roots), parts=tuple(parts))


def places_in(whole: Topology, parts: Sequence[TreePart]) -> tuple[Tensor, ...]:
    """Per depth (n_d,) int64: where the nodes that each prompt's part holds stand among those of the whole."""
    return tuple(
        torch.cat(
            [
                torch.arange(part.held[depth].start, part.held[depth].stop) + whole.span(prompt, depth).start
                for prompt, part in enumerate(parts)
            ]
        )
        for depth in whole.depths
    )


@dataclass(frozen=True)
class BranchTree:
    """A sampled tree: its topology, its states, and the log-density of the edge into each node.

    States are float32 whatever the model computes in, and opaque: the core indexes and stores them and never
    looks inside. The log-density of a deterministic edge, and of a root, is 0.
    """

    topology: Topology
    sigmas: Tensor  # (T + 1,) float32, CPU
    states: tuple[Tensor, ...]  # per depth (N_d, *latent) float32
    log_prob: tuple[Tensor, ...]  # per depth (N_d,) float32, CPU

    @property
    def leaves(self) -> Tensor:
        """The clean latents, (L, *latent)."""
        return self.states[-1]

    @staticmethod
    def joined(trees: Sequence[BranchTree]) -> BranchTree:
        """Trees of several batches of prompts, on one time grid, as the tree of all their prompts in this order."""
        if len(trees) == 1:
            return trees[0]
        topology = grow_parts([part for tree in trees for part in tree.topology.parts])
        return BranchTree(
            topology=topology,
            sigmas=trees[0].sigmas,
            states=tuple(torch.cat(level) for level in zip(*(tree.states for tree in trees), strict=True)),
            log_prob=tuple(torch.cat(level) for level in zip(*(tree.log_prob for tree in trees), strict=True)),
        )
