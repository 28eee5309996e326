"""Growing a tree of denoising trajectories: the only loop over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.grid import check_grid
from branchtree.noise import NoiseSource, Siblings, child_noise
from branchtree.protocols import VelocityFunction
from branchtree.solvers import Memory, Solver, dpm2m
from branchtree.staging import fetch_rows
from branchtree.transitions import GaussianTransition, Kernel, Reduction
from branchtree.tree import BranchTree, Topology


@dataclass(frozen=True)
class Sampler:
    """How transitions are sampled and scored; the same in the rollout and in the gradient pass."""

    kernel: Kernel
    siblings: Siblings
    sigmas: Tensor  # (T + 1,) float32, CPU
    reduction: Reduction = "mean"
    solver: Solver = "euler"  # of a prompt's steps after its last stochastic one

    def transition(
        self, latents: Tensor, prediction: Tensor, depth: Tensor, active: Tensor, target: Tensor | None = None
    ) -> GaussianTransition:
        """The transitions of rows at their own depths (B,), each to its ``target`` depth, by default the one after."""
        target = depth + 1 if target is None else target
        sigma, sigma_next = (self.sigmas[d].to(latents.device) for d in (depth, target))
        return self.kernel(latents, prediction, sigma, sigma_next, active.to(latents.device))

    def noise_weights(self) -> Tensor:
        """Each step's noise std over the mean of all steps' that can be stochastic, (T,) float32; 0 for the last.

        TempFlow-GRPO's noise-aware weights (arXiv 2508.04324, eq. 7): their mean is 1.
        """
        steps = self.sigmas.numel() - 1
        depth = torch.arange(steps - 1)
        nothing = torch.zeros(steps - 1, 1)
        std = self.transition(nothing, nothing, depth, torch.ones(steps - 1, dtype=torch.bool)).std.flatten()
        return torch.cat([std / std.mean(), torch.zeros(1)])


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
    memory = Memory.empty(states[0]) if sampler.solver == "dpm2m" else None
    for step in range(topology.steps):
        # A node whose step is skipped has been led to a depth beyond: its only child stands in the same place.
        following = states[step][topology.parent[step + 1].to(store)]
        density = torch.zeros(topology.width(step + 1))
        memory = memory and memory.rows(topology.parent[step + 1].to(store))
        nodes = topology.evaluated(step)
        for span in chunks(len(nodes), max_rows):
            rows = nodes[span.start : span.stop]
            place = torch.full((topology.width(step),), -1).scatter_(0, rows, torch.arange(len(rows)))
            family = place[topology.parent[step + 1]]
            children = torch.nonzero(family >= 0)[:, 0]
            family = family[children].to(device)
            latents = fetch_rows(states[step], rows, device)
            transition, prediction = _transition(velocity, sampler, topology, step, rows, latents)
            spread = transition.rows(family)
            base = _noise(sampler.siblings, topology, step, children, noise, prompt_ids, latents)
            at = children.to(store)
            following[at] = spread.sample(base).to(store)
            if memory is not None:
                _solve(sampler, topology, step, children, (latents[family], prediction[family]), following, memory)
            # Scored from the stored child, so that the gradient pass scores the very same numbers.
            density[children] = spread.log_prob(following[at].to(device), sampler.reduction).cpu()
        states.append(following)
        log_prob.append(density)
    return BranchTree(topology, sampler.sigmas, tuple(states), tuple(log_prob))


def forwards(topology: Topology, max_rows: int | None) -> int:
    """How often ``rollout`` asks for predictions."""
    return sum(len(chunks(len(topology.evaluated(step)), max_rows)) for step in range(topology.steps))


def chunks(rows: int, limit: int | None) -> list[range]:
    """Cut ``rows`` into runs of at most ``limit``."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} rows leaves nothing")
    size = max(rows, 1) if limit is None else limit
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _transition(
    velocity: VelocityFunction, sampler: Sampler, topology: Topology, step: int, rows: Tensor, latents: Tensor
) -> tuple[GaussianTransition, Tensor]:
    """The transitions of some nodes, and the predictions that they come from."""
    depth = torch.full((len(rows),), step)
    sigma = sampler.sigmas[depth].to(latents.device)
    prediction = velocity(latents, sigma, topology.root[step][rows].to(latents.device))
    active, target = topology.stochastic(step)[rows], topology.target(step)[rows]
    return sampler.transition(latents, prediction, depth, active, target), prediction


def _solve(
    sampler: Sampler,
    topology: Topology,
    step: int,
    children: Tensor,
    parents: tuple[Tensor, Tensor],
    following: Tensor,
    memory: Memory,
) -> None:
    """Take the solver's step instead for the children that come after their prompt's last stochastic step.

    ``parents`` are the latents and predictions of the children's parents; ``following`` and ``memory``, by node of the
    depth after, are changed in place.
    """
    after = topology.per_edge(step, [plan.last_stochastic < step for plan in topology.plans])
    chosen = torch.nonzero(after[children])[:, 0]
    if not len(chosen):
        return
    latents, prediction = (part[chosen.to(part.device)] for part in parents)
    nodes = children[chosen].to(following.device)
    target = topology.target(step)[topology.parent[step + 1][children[chosen]]]
    sigma = sampler.sigmas[torch.full_like(target, step)].to(latents.device)
    before = Memory(memory.clean[nodes].to(latents.device), memory.sigma[nodes].to(latents.device))
    solved, kept = dpm2m(latents, prediction, sigma, sampler.sigmas[target].to(latents.device), before)
    following[nodes] = solved.to(following.device)
    memory.clean[nodes], memory.sigma[nodes] = kept.clean.to(following.device), kept.sigma.to(following.device)


def _noise(
    siblings: Siblings,
    topology: Topology,
    step: int,
    children: Tensor,
    source: NoiseSource,
    prompt_ids: Sequence[int],
    latents: Tensor,
) -> Tensor:
    """Base noise of some children, ascending; zero where the step is deterministic, which needs none drawn."""
    noise = torch.zeros(len(children), *latents.shape[1:])
    for prompt, plan in enumerate(topology.plans):
        nodes = topology.span(prompt, step + 1)
        # A prompt's nodes adjoin and are all evaluated or none: those among the children are a run of them.
        first, last = torch.searchsorted(children, torch.tensor([nodes.start, nodes.stop])).tolist()
        if first >= last or not plan.stochastic[step]:
            continue
        # Noise is addressed by places in the whole tree; of its families a part may lack the first or last children.
        start = int(children[first]) - nodes.start + topology.parts[prompt].held[step + 1].start
        branches, stop = plan.factors[step], start + last - first
        parents = range(start // branches, -(-stop // branches))
        families = child_noise(source, siblings, prompt_ids[prompt], step + 1, parents, branches, latents.shape[1:])
        skipped = start - parents.start * branches
        noise[first:last] = families[skipped : skipped + last - first]
    return noise.to(latents.device)
