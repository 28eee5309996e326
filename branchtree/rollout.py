"""Growing a tree of denoising trajectories: the only loop over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.grid import check_grid
from branchtree.noise import NoiseSource, Siblings, child_noise
from branchtree.protocols import VelocityFunction
from branchtree.transitions import GaussianTransition, Kernel, Reduction
from branchtree.tree import BranchTree, Topology


@dataclass(frozen=True)
class Sampler:
    """How transitions are sampled and scored; the same in the rollout and in the gradient pass."""

    kernel: Kernel
    siblings: Siblings
    sigmas: Tensor  # (T + 1,) float32, CPU
    reduction: Reduction = "mean"

    def transition(self, latents: Tensor, prediction: Tensor, depth: Tensor, active: Tensor) -> GaussianTransition:
        """The transitions of rows at their own depths (B,), each to the depth after."""
        sigma, sigma_next = (self.sigmas[d].to(latents.device) for d in (depth, depth + 1))
        return self.kernel(latents, prediction, sigma, sigma_next, active.to(latents.device))


@torch.no_grad()
def rollout(
    velocity: VelocityFunction,
    sampler: Sampler,
    topology: Topology,
    initial: Tensor,
    noise: NoiseSource,
    prompt_ids: Sequence[int],
    max_rows: int | None = None,
    store: torch.device | None = None,
) -> BranchTree:
    """Sample a tree for P prompts.

    All nodes of a depth are one batch, cut to ``max_rows`` only for memory. ``initial`` (P, *latent) is the
    noise that all leaves of a prompt start from; ``prompt_ids`` (P,) are the prompts' addresses for noise;
    ``store`` is where states are kept (by default where ``initial`` is). Raises ValueError on a time grid that
    does not fit the topology.
    """
    check_grid(sampler.sigmas)
    if sampler.sigmas.numel() != topology.steps + 1:
        raise ValueError(f"{topology.steps} steps need {topology.steps + 1} noise levels, not {sampler.sigmas.numel()}")
    if not initial.shape[0] == len(prompt_ids) == topology.prompts:
        raise ValueError(f"{topology.prompts} prompts need as many initial noises and prompt ids")
    device, store = initial.device, store or initial.device
    states, log_prob = [initial.float().to(store)], [torch.zeros(topology.prompts)]
    for step in range(topology.steps):
        following = torch.empty(topology.width(step + 1), *initial.shape[1:], device=store)
        density = torch.zeros(topology.width(step + 1))
        for rows in chunks(topology.width(step), max_rows):
            latents = states[step][rows.start : rows.stop].to(device)
            children = child_span(topology, step, rows)
            span = slice(children.start, children.stop)
            transition = _transition(velocity, sampler, topology, step, rows, latents)
            spread = transition.rows((topology.parent[step + 1][span] - rows.start).to(device))
            base = _noise(sampler.siblings, topology, step, children, noise, prompt_ids, latents)
            following[span] = spread.sample(base).to(store)
            # Scored from the stored child, so that the gradient pass scores the very same numbers.
            density[span] = spread.log_prob(following[span].to(device), sampler.reduction).cpu()
        states.append(following)
        log_prob.append(density)
    return BranchTree(topology, sampler.sigmas, tuple(states), tuple(log_prob))


def chunks(rows: int, limit: int | None) -> list[range]:
    """Cut ``rows`` into runs of at most ``limit``."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} rows leaves nothing")
    size = max(rows, 1) if limit is None else limit
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def child_span(topology: Topology, step: int, parents: range) -> range:
    """Where the children of a run of parents lie at depth ``step + 1``."""
    bounds = torch.searchsorted(topology.parent[step + 1], torch.tensor([parents.start, parents.stop]))
    return range(int(bounds[0]), int(bounds[1]))


def _transition(
    velocity: VelocityFunction, sampler: Sampler, topology: Topology, step: int, rows: range, latents: Tensor
) -> GaussianTransition:
    span = slice(rows.start, rows.stop)
    depth = torch.full((len(rows),), step)
    sigma = sampler.sigmas[depth].to(latents.device)
    prediction = velocity(latents, sigma, topology.root[step][span].to(latents.device))
    return sampler.transition(latents, prediction, depth, topology.stochastic(step)[span])


def _noise(
    siblings: Siblings,
    topology: Topology,
    step: int,
    children: range,
    source: NoiseSource,
    prompt_ids: Sequence[int],
    latents: Tensor,
) -> Tensor:
    """Base noise of a run of children; zero where the step is deterministic, which needs none drawn."""
    noise = torch.zeros(len(children), *latents.shape[1:])
    for prompt, plan in enumerate(topology.plans):
        nodes = topology.span(prompt, step + 1)
        start, stop = max(nodes.start, children.start), min(nodes.stop, children.stop)
        if start >= stop or not plan.stochastic[step]:
            continue
        branches = plan.factors[step]
        parents = range((start - nodes.start) // branches, (stop - nodes.start) // branches)
        noise[start - children.start : stop - children.start] = child_noise(
            source, siblings, prompt_ids[prompt], step + 1, parents, branches, latents.shape[1:]
        )
    return noise.to(latents.device)
