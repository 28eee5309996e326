"""The branching tree of one batch of prompts, as flat arrays.

Axis letters: P prompts, L leaves, N_d nodes at depth d (all prompts together). Nodes of a depth are ordered by
prompt, then by parent, then by order among siblings, so a prompt's nodes and a parent's children are contiguous.
Prompts may branch at different steps: the arrays are ragged in d and never padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from branchtree.core.schedule import TreePlan
from branchtree.core.sharing import TreeShare
from branchtree.core.transitions import Reduction

NO_PARENT = -1
"""Parent index of a root."""


@dataclass(frozen=True)
class Topology:
    """Who descends from whom. All index arrays live on the CPU."""

    plans: tuple[TreePlan, ...]  # P
    parent: tuple[Tensor, ...]  # per depth (N_d,) int64, into the depth before
    root: tuple[Tensor, ...]  # per depth (N_d,) int64, which prompt
    shares: tuple[TreeShare, ...]  # P: which of each prompt's nodes are held here; all, but where a tree is shared

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
        """The nodes of a depth that go through the denoiser, ascending; those of some consecutive prompts, or all."""
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
            len(share.held[depth])
            for share in self.shares
            for depth in self.depths[:-1]
            if depth not in share.plan.skipped
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
        """Return whether each node of a depth has exactly one child, and so its child's index and leaves."""
        return depth < self.steps and self.width(depth) == self.width(depth + 1)

    def per_edge(self, step: int, flags: Sequence[bool] | Sequence[int]) -> Tensor:
        """Spread one value per prompt over the edges of a step: (N_{step+1},)."""
        return torch.tensor(flags)[self.root[step + 1]]

    def stochastic(self, step: int) -> Tensor:
        """Return which nodes of depth ``step`` take a stochastic step, (N_step,) bool."""
        return torch.tensor([plan.stochastic[step] for plan in self.plans])[self.root[step]]

    def active(self, step: int) -> Tensor:
        """Return the noise of each node's step over the kernel's own, (N_step,).

        Bool, where every plan has the kernel's own noise or none at this step; float32 otherwise.
        """
        return torch.tensor([plan.active(step) for plan in self.plans])[self.root[step]]

    def still(self, step: int) -> Tensor:
        """Return which children of a step's nodes, (N_step+1,), take the deterministic step beside noisy siblings."""
        flags = torch.zeros(self.width(step + 1), dtype=torch.bool)
        for prompt, plan in enumerate(self.plans):
            if plan.still and plan.factors[step] > 1:
                children, held = self.span(prompt, step + 1), self.shares[prompt].held[step + 1]
                flags[children.start : children.stop] = torch.tensor([i % plan.factors[step] == 0 for i in held])
        return flags

    def span(self, prompt: int, depth: int) -> range:
        """Return where a prompt's nodes lie among those of a depth."""
        start = sum(len(share.held[depth]) for share in self.shares[:prompt])
        return range(start, start + len(self.shares[prompt].held[depth]))

    def block(self, prompts: range, depth: int) -> range:
        """Return where the nodes of some consecutive prompts lie among those of a depth."""
        return range(self.span(prompts[0], depth).start, self.span(prompts[-1], depth).stop)

    def select(self, prompts: range) -> Topology:
        """Return the topology of some consecutive prompts alone."""
        blocks = [self.block(prompts, depth) for depth in self.depths]
        above = [0, *(block.start for block in blocks[:-1])]
        return Topology(
            plans=self.plans[prompts.start : prompts.stop],
            parent=tuple(
                parent[block.start : block.stop] - start
                for parent, block, start in zip(self.parent, blocks, above, strict=True)
            ),
            root=tuple(
                root[block.start : block.stop] - prompts.start for root, block in zip(self.root, blocks, strict=True)
            ),
            shares=self.shares[prompts.start : prompts.stop],
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
    shares = tuple(TreeShare.whole(plan) for plan in plans)
    return Topology(plans=tuple(plans), parent=tuple(parents), root=tuple(roots), shares=shares)


def grow_shares(shares: Sequence[TreeShare]) -> Topology:
    """Return the topology of one share of each prompt's tree, with its nodes in the order of the whole."""
    whole = grow([share.plan for share in shares])
    if all(share.is_whole for share in shares):
        return whole
    parents, roots, here = [], [], torch.tensor([NO_PARENT])
    for depth, nodes in enumerate(indices_in(whole, shares)):
        parents.append(here[whole.parent[depth][nodes]])
        roots.append(whole.root[depth][nodes])
        here = torch.full((whole.width(depth),), NO_PARENT).scatter_(0, nodes, torch.arange(len(nodes)))
    return Topology(plans=whole.plans, parent=tuple(parents), root=tuple(roots), shares=tuple(shares))


def indices_in(whole: Topology, shares: Sequence[TreeShare]) -> tuple[Tensor, ...]:
    """Return, per depth (n_d,) int64, the indices among the whole's nodes of those that each prompt's share holds."""
    return tuple(
        torch.cat(
            [
                torch.arange(share.held[depth].start, share.held[depth].stop) + whole.span(prompt, depth).start
                for prompt, share in enumerate(shares)
            ]
        )
        for depth in whole.depths
    )


@dataclass(frozen=True)
class BranchTree:
    """A sampled tree: its topology, its states, and the log-density of the edge into each node.

    States are float32 whatever the model computes in, or integers, and opaque: the core indexes and stores them and
    never looks inside. The log-density of a deterministic edge, and of a root, is 0.
    """

    topology: Topology
    sigmas: Tensor  # (T + 1,) float32, CPU
    states: tuple[Tensor, ...]  # per depth (N_d, *latent), float32 or integers
    log_prob: tuple[Tensor, ...]  # per depth (N_d,) float32, CPU
    clean: tuple[
        Tensor, ...
    ] = ()  # per depth (N_d, *latent), the clean sample predicted at each node, where it is kept

    @property
    def leaves(self) -> Tensor:
        """The clean latents, (L, *latent)."""
        return self.states[-1]

    @property
    def dimensions(self) -> int:
        """Numbers in one sample's latents."""
        return self.leaves[0].numel()

    def mean_log_prob(self, reduction: Reduction) -> list[Tensor]:
        """Return the edges' log-densities averaged over latent dimensions, per depth (N_d,).

        ``reduction`` says what ``log_prob`` holds: the averages already, or sums.
        """
        divisor = self.dimensions if reduction == "sum" else 1
        return [level / divisor for level in self.log_prob]
