"""The (noise level, noise) pairs at which a forward objective looks at nodes, and the rows that follow from them.

The nodes are leaves and, where they are trained too, inner nodes with the clean samples predicted there. A pair is
addressed by (seed, iteration, prompt, draw, source): ``source`` is the node's own number in its prompt's tree, its
family's, or 0, so that nodes share pairs where they have the same source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.forward import group_means
from branchtree.core.gate import open_rows
from branchtree.core.gathering import looked_up, owned_indices
from branchtree.core.grid import shift_sigmas
from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.schedule import TreePlan
from branchtree.core.tree import Topology

Times = Literal["uniform", "stratified", "logit_normal", "grid"]
Share = Literal["leaf", "siblings", "group"]

LEAST_SIGMA = 1e-3
"""The least noise level that is drawn: below it the target says nothing that the state does not."""


@dataclass(frozen=True)
class ForwardRows:
    """F rows, each a node under one of its draws, ordered by depth, by node and then by draw."""

    iteration: int
    depth: Tensor  # (F,) int64, of the node; that of leaves, unless inner nodes are trained too
    node: Tensor  # (F,) int64, among the nodes of its depth, of all prompts
    prompt: Tensor  # (F,) int64
    prompt_id: Tensor  # (F,) int64, the prompt's address for noise
    draw: Tensor  # (F,) int64
    source: Tensor  # (F,) int64, what the draw belongs to, in the whole tree
    group: Tensor  # (F,) int64, what a centred loss compares at a depth: a family of the whole tree, or 0 for all
    advantage: Tensor  # (F,) float32
    group_value: Tensor  # (F,) float32, as in ``ForwardBatch``
    gate: Tensor | None = None  # (F,) float32, how far a KL term acts on the node; without a gate on all alike

    def __len__(self) -> int:
        return self.node.numel()

    @property
    def edges(self) -> int:
        """Terms of the loss: one for each row."""
        return len(self)

    @property
    def gated(self) -> Tensor:
        """The rows that a KL term acts on, ascending; the first where there is none."""
        every = torch.arange(len(self))
        return every if self.gate is None else open_rows(every, self.gate)

    def select(self, index: Tensor) -> ForwardRows:
        """Some of the rows, ``index`` (F',) ascending."""
        chosen = {
            field.name: getattr(self, field.name)[index]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **chosen)

    def within(self, topology: Topology, first: int) -> ForwardRows:
        """Return the rows of prompts ``first`` and after, collected from them alone, by their indices among all."""
        starts = torch.tensor([topology.span(first, depth).start for depth in topology.depths])
        return replace(self, node=self.node + starts[self.depth], prompt=self.prompt + first)

    def owned(self, whole: Topology, share: Topology) -> ForwardRows:
        """Return the rows of those of the whole's nodes that a share owns, by their indices in the share."""
        here, mine = owned_indices(whole, share)
        chosen = self.select(torch.nonzero(looked_up(mine, self.depth, self.node))[:, 0])
        return replace(chosen, node=looked_up(here, chosen.depth, chosen.node))

    def with_group_value(self, value: Tensor) -> ForwardRows:
        """Return the rows with the mean of ``value`` (F,) over those of a group that have the same draw."""
        return replace(self, group_value=group_means(value, self._groups))

    @property
    def _groups(self) -> Tensor:
        return torch.stack([self.prompt_id, self.depth, self.group, self.draw], dim=1)


@dataclass(frozen=True)
class DrawRule:
    """Which (noise level, noise) pairs each node gets.

    - ``uniform`` levels are drawn evenly and independently;
    - ``stratified`` ones each from an interval of its own, as many as there are draws;
    - ``logit_normal`` are such draws of a standard normal's logistic function (arXiv 2403.03206, section 3.1);
    - ``grid`` are steps of the rollout's grid, each from an interval of its own.

    All but the last are then shifted towards noise, see ``shift_sigmas``. None is above the grid's first level.
    """

    seed: int
    count: int = 4
    share: Share = "leaf"
    times: Times = "stratified"
    shift: float = 1.0

    def rows(
        self, credit: Credit, topology: Topology, ids: Sequence[int], iteration: int, centred: bool = False
    ) -> ForwardRows:
        """Return the rows of the nodes that a credit trains, of whole trees; ``ids`` (P,) address the prompts.

        ``centred`` advantages are less the mean over their group's trained nodes.
        """
        trained = [torch.nonzero(mask)[:, 0] for mask in credit.trained(topology)]
        depth = torch.cat([torch.full_like(nodes, at) for at, nodes in enumerate(trained)])
        node = torch.cat(trained)
        prompt, nothing = looked_up(topology.root, depth, node), torch.zeros_like(node)
        own, family = (
            torch.cat([address(topology, at)[nodes] for at, nodes in enumerate(trained) if len(nodes)] or [nothing])
            for address in (_own, _family)
        )
        sources = {"leaf": own, "siblings": family, "group": nothing}
        rows = ForwardRows(
            iteration=iteration,
            depth=depth,
            node=node,
            prompt=prompt,
            prompt_id=torch.tensor(list(ids), dtype=torch.int64)[prompt],
            draw=nothing,
            source=sources[self.share],
            group=family if self.share == "siblings" else nothing,
            advantage=looked_up(credit.advantages, depth, node).float(),
            group_value=torch.zeros(len(node)),
            gate=None if credit.gate is None else looked_up(credit.gate, depth, node).float(),
        )
        if centred:
            mean = rows.with_group_value(rows.advantage).group_value
            rows = replace(rows, advantage=rows.advantage - mean)
        repeated = rows.select(torch.arange(len(rows)).repeat_interleave(self.count))
        return replace(repeated, draw=torch.arange(self.count).repeat(len(rows)))

    def draw(self, rows: ForwardRows, sigmas: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the noise level (F,) and the noise (F, *shape) of each row, float32 on the CPU.

        ``sigmas`` (T + 1,) are the rollout's grid.
        """
        addresses = torch.stack([rows.prompt_id, rows.draw, rows.source], dim=1)
        unique, index = torch.unique(addresses, dim=0, return_inverse=True)
        uniform, noise = torch.empty(len(unique), dtype=torch.float64), torch.empty(len(unique), *shape)
        source = NoiseSource(self.seed, rows.iteration)
        for i, (prompt, draw, node) in enumerate(unique.tolist()):
            address = generator(self.seed, rows.iteration, prompt, draw, node, Purpose.TIME)
            uniform[i] = torch.rand((), generator=address, dtype=torch.float64)
            noise[i] = source.normal(Purpose.FORWARD, prompt, draw, [node], shape)[0]
        return self._levels(uniform, unique[:, 1], sigmas)[index], noise[index]

    def _levels(self, uniform: Tensor, draw: Tensor, sigmas: Tensor) -> Tensor:
        """Return noise levels for uniform numbers in [0, 1) and the draws (U,) that they belong to."""
        stratum = uniform if self.times == "uniform" else (draw + uniform) / self.count
        if self.times == "grid":
            return sigmas[(stratum * (len(sigmas) - 1)).long()]
        if self.times == "logit_normal":
            stratum = torch.sigmoid(torch.special.ndtri(stratum))
        return (shift_sigmas(stratum, self.shift) * sigmas[0]).clamp_min(LEAST_SIGMA).float()


def _own(topology: Topology, depth: int) -> Tensor:
    """Return a number of each node of a depth, (N_d,), that no other node of its prompt has: those of leaves first."""
    first = [
        (0 if depth == plan.steps else plan.leaves + _above(plan, depth)) - topology.span(prompt, depth).start
        for prompt, plan in enumerate(topology.plans)
    ]
    return torch.arange(topology.width(depth)) + torch.tensor(first)[topology.root[depth]]


def _family(topology: Topology, depth: int) -> Tensor:
    """Return a number of the node at the last split above that each node of a depth descends from, (N_d,).

    So siblings, and all that descends from them up to the next split, have the same. Those of the last split come
    first; without a split above it is the root.
    """
    split = [max((step for step in plan.splits if step < depth), default=0) for plan in topology.plans]
    root = topology.root[depth]
    node, at = torch.arange(topology.width(depth)), torch.tensor(split)[root]
    for step in range(depth - 1, min(split) - 1, -1):
        node = torch.where(at <= step, topology.parent[step + 1][node.clamp_max(topology.width(step + 1) - 1)], node)
    first = [
        (0 if step == max(plan.last_split, 0) else plan.widths[max(plan.last_split, 0)] + _above(plan, step))
        - topology.span(prompt, step).start
        for prompt, (plan, step) in enumerate(zip(topology.plans, split, strict=True))
    ]
    return node + torch.tensor(first)[root]


def _above(plan: TreePlan, depth: int) -> int:
    """Return how many nodes of a prompt's tree lie above a depth."""
    return sum(plan.widths[:depth])
