"""How much noise a sampler injects into a leaf.

A stochastic step i adds std_i times standard normal noise, std_i being the kernel's noise scale between its two noise
levels. A leaf gets sqrt(sum of std_i^2 over the stochastic steps on its path), whatever later steps make of it. Methods
that share a noise level eta differ in it by the number and length of their stochastic steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from branchtree.core.schedule import TreePlan


@dataclass(frozen=True)
class LeafNoise:
    """The noise of a leaf, and that of the steps from the first split on, by which leaves of a prompt differ."""

    total: float
    differing: float


def leaf_noise(plans: Iterable[TreePlan], scale: Tensor) -> LeafNoise:
    """Return the mean over plans of a leaf's noise.

    Args:
        plans: At least one, each as likely as the others.
        scale: The noise scale of each step if it is stochastic, (T,).
    """
    variance = scale.double().square().tolist()
    totals, differing = [], []
    for plan in plans:
        first = plan.splits[0] if plan.splits else plan.steps
        # A factor of the noise scales the deviation; under `cps` so far as the sine of its angle is linear.
        added = [each * plan.active(step) ** 2 for step, each in enumerate(variance)]
        totals.append(sum(added) ** 0.5)
        differing.append(sum(added[first:]) ** 0.5)
    return LeafNoise(sum(totals) / len(totals), sum(differing) / len(differing))
