"""The (noise level, noise) pairs at which a forward objective looks at leaves, and the rows that follow from them.

A pair is addressed by (seed, iteration, prompt, draw, source): ``source`` is the leaf among the prompt's leaves, the
family among its families, or 0, so that leaves share pairs where they have the same source.
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
from branchtree.core.gathering import owned_indices
from branchtree.core.grid import shift_sigmas
from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.tree import Topology

Times = Literal["uniform", "stratified", "logit_normal", "grid"]
Share = Literal["leaf", "siblings", "group"]

LEAST_SIGMA = 1e-3
"""The least noise level that is drawn: below it the target says nothing that the state does not."""


@dataclass(frozen=True)
class LeafRows:
    """F rows, each a leaf under one of its draws, ordered by leaf and then by draw."""

    iteration: int
    steps: int  # T, the depth of leaves
    leaf: Tensor  # (F,) int64, among the leaves of all prompts
    prompt: Tensor  # (F,) int64
    prompt_id: Tensor  # (F,) int64, the prompt's address for noise
    draw: Tensor  # (F,) int64
    source: Tensor  # (F,) int64, what the draw belongs to, in the whole tree
    group: Tensor  # (F,) int64, what a centred loss compares: a family of the whole tree, or 0 for the prompt
    advantage: Tensor  # (F,) float32
    group_value: Tensor  # (F,) float32, as in ``ForwardBatch``
    gate: Tensor | None = None  # (F,) float32, how far a KL term acts on the leaf; without a gate on all alike

    def __len__(self) -> int:
        return self.leaf.numel()

    @property
    def edges(self) -> int:
        """Terms of the loss: one for each row."""
        return len(self)

    @property
    def depth(self) -> Tensor:
        """The depth of each row's leaf, (F,) int64."""
        return torch.full_like(self.leaf, self.steps)

    @property
    def gated(self) -> Tensor:
        """The rows that a KL term acts on, ascending; the first where there is none."""
        every = torch.arange(len(self))
        return every if self.gate is None else open_rows(every, self.gate)

    def select(self, index: Tensor) -> LeafRows:
        """Some of the rows, ``index`` (F',) ascending."""
        chosen = {
            field.name: getattr(self, field.name)[index]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **chosen)

    def within(self, topology: Topology, first: int) -> LeafRows:
        """Return the rows of prompts ``first`` and after, collected from them alone, by their indices among all."""
        start = topology.span(first, topology.steps).start
        return replace(self, leaf=self.leaf + start, prompt=self.prompt + first)

    def owned(self, whole: Topology, share: Topology) -> LeafRows:
        """Return the rows of those of the whole's leaves that a share owns, by their indices in the share."""
        here, mine = owned_indices(whole, share)
        chosen = self.select(torch.nonzero(mine[-1][self.leaf])[:, 0])
        return replace(chosen, leaf=here[-1][chosen.leaf])

    def with_group_value(self, value: Tensor) -> LeafRows:
        """Return the rows with the mean of ``value`` (F,) over those of a group that have the same draw."""
        return replace(self, group_value=group_means(value, self._groups))

    @property
    def _groups(self) -> Tensor:
        return torch.stack([self.prompt_id, self.group, self.draw], dim=1)


@dataclass(frozen=True)
class DrawRule:
    """Which (noise level, noise) pairs each leaf gets.

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
    ) -> LeafRows:
        """Return the rows of the leaves that a credit trains, of whole trees; ``ids`` (P,) address the prompts.

        ``centred`` advantages are less the mean over their group's trained leaves.
        """
        leaves = torch.nonzero(credit.trained(topology)[-1])[:, 0]
        prompt, family = topology.leaf_root[leaves], _families(topology)[leaves]
        nothing = torch.zeros_like(leaves)
        starts = torch.tensor([topology.span(i, topology.steps).start for i in range(topology.prompts)])
        sources = {"leaf": leaves - starts[prompt], "siblings": family, "group": nothing}
        rows = LeafRows(
            iteration=iteration,
            steps=topology.steps,
            leaf=leaves,
            prompt=prompt,
            prompt_id=torch.tensor(list(ids), dtype=torch.int64)[prompt],
            draw=nothing,
            source=sources[self.share],
            group=family if self.share == "siblings" else nothing,
            advantage=credit.advantages[-1][leaves].float(),
            group_value=torch.zeros(len(leaves)),
            gate=None if credit.gate is None else credit.gate[-1][leaves].float(),
        )
        if centred:
            mean = rows.with_group_value(rows.advantage).group_value
            rows = replace(rows, advantage=rows.advantage - mean)
        repeated = rows.select(torch.arange(len(rows)).repeat_interleave(self.count))
        return replace(repeated, draw=torch.arange(self.count).repeat(len(rows)))

    def draw(self, rows: LeafRows, sigmas: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
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


def _families(topology: Topology) -> Tensor:
    """Return which of its prompt's nodes at the last split each leaf descends from, (L,): siblings have the same."""
    depth = [max(plan.last_split, 0) for plan in topology.plans]
    starts = [topology.span(prompt, at).start for prompt, at in enumerate(depth)]
    chain = torch.stack(topology.ancestor)  # (T + 1, L)
    prompt = topology.leaf_root
    return chain[torch.tensor(depth)[prompt], torch.arange(len(prompt))] - torch.tensor(starts)[prompt]
