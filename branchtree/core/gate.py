"""A gate for a KL term (GARDO, arXiv 2512.24138): it opens for leaves that only the trained rewards rank high.

There a reward is likely to be exploited. Only those leaves are pulled back; the policy may leave its start elsewhere.
Ranks are taken over all leaves of an iteration, so the scales of rewards do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.core.segments import segment_mean
from branchtree.core.tree import Topology

GateState = Mapping[str, Any]
"""The share of leaves, and the mean disagreements seen: what JSON can hold."""

Gate = tuple[Tensor, ...]
"""Per depth (N_d,) float64, 0 to 1: how far the KL term acts on the edge into each node."""

STEP, WIDEST, SEEN = 0.1, (0.2, 2.0), 20
"""How much the share changes at a time, its range over the first one, and the iterations that are compared with."""


@dataclass(frozen=True)
class GateRule:
    """Which leaves a KL term acts on: the ``share`` of them on which rankings disagree most.

    Where it ``adapts``, the share grows by a tenth in an iteration whose mean disagreement is above that of each of the
    last ``SEEN``, and shrinks by a tenth where it is below all of them.
    """

    share: float = 0.1
    adapts: bool = True

    def start(self) -> GateState:
        """Return the state before the first iteration."""
        return {"share": self.share, "seen": []}

    def observe(self, state: GateState, disagreement: Tensor) -> GateState:
        """Return the state with which an iteration's leaves are weighed, whose ``disagreement`` (L,) is known."""
        positive = disagreement[disagreement >= 0]
        if not len(positive):
            return state
        mean, seen, share = float(positive.mean()), state["seen"], state["share"]
        if self.adapts and seen:
            share *= 1 + STEP * ((mean > max(seen)) - (mean < min(seen)))
            least, most = (factor * self.share for factor in WIDEST)
            share = min(max(share, least), most, 1.0)
        return {"share": share, "seen": [*seen, mean][-SEEN:]}


def win_rate(scores: Scores, sign: float = 1.0) -> Tensor:
    """Return which fraction of the other samples each beats, a tie being half a win, (L,) float64.

    1/2 for a sample alone, and NaN for one that could not be scored. A negative ``sign`` turns the reward round.
    """
    usable = scores.usable
    _, value, count = torch.unique(sign * scores.values.cpu()[usable], return_inverse=True, return_counts=True)
    below, ties = count.cumsum(0) - count, count - 1
    others = max(int(usable.sum()) - 1, 1)
    rate = (below + 0.5 * ties + 0.5 * (len(value) == 1))[value].double() / others
    return torch.full((len(scores),), torch.nan, dtype=torch.float64).masked_scatter_(usable, rate)


def disagreements(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Tensor:
    """Return how much higher the trained rewards rank each leaf than those of weight 0 do, (L,) float64, -1 to 1.

    Trained rewards count by the size of their weight, auxiliary ones evenly. NaN where one of the former, or all of the
    latter, could not score a leaf. ``scores`` and ``weights`` are by label.
    """
    trained = {label: weight for label, weight in weights.items() if weight != 0}
    total = sum(abs(weight) for weight in trained.values())
    rates = [abs(weight) / total * win_rate(scores[label], weight) for label, weight in trained.items()]
    auxiliary = [win_rate(score) for label, score in scores.items() if label not in trained]
    difference = torch.stack(rates).sum(0) - torch.stack(auxiliary).nanmean(0)
    return difference.round(decimals=12)  # what agrees, or ties, does so to the bit


def gate_weights(disagreement: Tensor, share: float) -> Tensor:
    """Return how far the gate is open for each leaf, (L,) float64: 1 where the ``disagreement`` is largest.

    The weights add up to ``share`` of the leaves whose disagreement is known, unless fewer have a positive one. Leaves
    that tie at the end share what is left.
    """
    suspect = disagreement > 0
    _, value, count = torch.unique(disagreement[suspect], return_inverse=True, return_counts=True)
    above = (int(suspect.sum()) - count.cumsum(0)).double()
    budget = share * int((~disagreement.isnan()).sum())
    weight = ((budget - above) / count).clamp(0, 1)[value]
    return torch.zeros_like(disagreement).masked_scatter_(suspect, weight)


def gate_of(topology: Topology, leaves: Tensor) -> Gate:
    """Return the gate of every edge: the mean of the weights (L,) of the leaves below it."""
    return tuple(segment_mean(leaves, topology.ancestor[depth], topology.width(depth)) for depth in topology.depths)


def open_rows(row: Tensor, gate: Tensor) -> Tensor:
    """Return the rows of the denoiser that have a term with an open gate, ascending, from each term's ``row`` (E,).

    The first row where there is none: so every process that has rows sends some to the start policy.
    """
    rows = torch.unique(row[gate > 0])
    return rows if len(rows) else row[:1]
