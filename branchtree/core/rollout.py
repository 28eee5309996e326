"""Growing a tree of denoising trajectories: the only loop over steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.grid import check_grid
from branchtree.core.noise import NoiseSource, Siblings, child_noise
from branchtree.core.solvers import Memory, Solver, dpm2m
from branchtree.core.transfer import fetch_rows, send
from branchtree.core.transitions import GaussianTransition, Kernel, Reduction
from branchtree.core.tree import BranchTree, Topology

VelocityFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, *latent), sigma (B,), prompt index (B,) int64) -> prediction (B, *latent), float32."""


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
        sigma, sigma_next = (send(self.sigmas[d], latents.device) for d in (depth, target))
        return self.kernel(latents, prediction, sigma, sigma_next, send(active, latents.device))

    def noise_weights(self) -> Tensor:
        """Each step's noise std over the mean of all steps' that can be stochastic, (T,) float32; 0 for the last.

        TempFlow-GRPO's noise-aware weights (arXiv 2508.04324, eq. 7): their mean is 1.
        """
        steps = self.sigmas.numel() - 1
        depth = torch.arange(steps - 1)
        nothing = torch.zeros(steps - 1, 1)
        std = self.transition(nothing, nothing, depth, torch.ones(steps - 1, dtype=torch.bool)).std.flatten()
        return torch.cat([std / std.mean(), torch.zeros(1)])


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that the nodes of adjoining prompts take in the same batches."""

    steps: range
    prompts: range


def stages(topology: Topology, together: int | None = None) -> list[Stage]:
    """All prompts' steps up to the last split, then ``together`` prompts at a time to the end; all of them by default.

    Up to the last split a depth has few nodes of each prompt, so a batch wants those of all. After it, prompts that are
    done first can be decoded and scored while the others go on.
    """
    steps, groups = range(topology.steps), chunks(topology.prompts, together)
    if len(groups) == 1:
        return [Stage(steps, groups[0])]
    split = max(plan.last_split for plan in topology.plans) + 1
    return [Stage(steps[:split], range(topology.prompts)), *(Stage(steps[split:], group) for group in groups)]


Finished = Callable[[range, Tensor], None]
"""Is told of prompts whose leaves are there, and of their clean latents (L, *latent)."""


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
    together: int | None = None,
    finished: Finished | None = None,
) -> BranchTree:
    """Sample a tree for P prompts.

    All nodes of a depth are one batch, cut to ``max_rows`` only for memory. ``initial`` (P, *latent) is the
    noise that all leaves of a prompt start from; ``prompt_ids`` (P,) are the prompts' addresses for noise;
    ``store`` is where states are kept (by default where ``initial`` is). After the last split ``together`` prompts at a
    time go on, and ``finished`` is told as they end. Raises ValueError on a time grid that does not fit the topology.
    """
    check_grid(sampler.sigmas)
    if sampler.sigmas.numel() != topology.steps + 1:
        raise ValueError(f"{topology.steps} steps need {topology.steps + 1} noise levels, not {sampler.sigmas.numel()}")
    if not initial.shape[0] == len(prompt_ids) == topology.prompts:
        raise ValueError(f"{topology.prompts} prompts need as many initial noises and prompt ids")
    states = [initial.float().to(store or initial.device)]
    log_prob = [torch.zeros(topology.prompts, device=initial.device)]
    memory = Memory.empty(states[0]) if sampler.solver == "dpm2m" else None
    growth = _Growth(topology, sampler, velocity, noise, prompt_ids, max_rows, initial.device, states, log_prob)
    for stage in stages(topology, together):
        here = topology.block(stage.prompts, stage.steps.start)
        reached = growth.advance(stage, memory and memory.rows(torch.arange(here.start, here.stop)))
        if stage.steps.stop < topology.steps:
            memory = reached
        elif finished is not None:
            leaves = topology.block(stage.prompts, topology.steps)
            finished(stage.prompts, states[-1][leaves.start : leaves.stop])
    # One copy of all densities: each would make the host wait for the device.
    densities = torch.cat(log_prob).cpu().split([len(level) for level in log_prob])
    return BranchTree(topology, sampler.sigmas, tuple(states), densities)


@dataclass(frozen=True)
class _Growth:
    """A tree while it grows."""

    topology: Topology
    sampler: Sampler
    velocity: VelocityFunction
    noise: NoiseSource
    prompt_ids: Sequence[int]
    max_rows: int | None
    device: torch.device
    states: list[Tensor]  # per depth reached by any prompt (N_d, *latent)
    log_prob: list[Tensor]  # (N_d,), on the device

    def advance(self, stage: Stage, memory: Memory | None) -> Memory | None:
        """Take a stage's steps; ``memory`` is of its nodes before, and what is returned of those after."""
        for step in stage.steps:
            memory = self._step(step, stage.prompts, memory)
        return memory

    def _step(self, step: int, prompts: range, memory: Memory | None) -> Memory | None:
        topology, store = self.topology, self.states[0].device
        above, below = topology.block(prompts, step), topology.block(prompts, step + 1)
        if step + 1 == len(self.states):
            self.states.append(self.states[0].new_empty(topology.width(step + 1), *self.states[0].shape[1:]))
            self.log_prob.append(torch.zeros(topology.width(step + 1), device=self.device))
        parent, nodes = topology.parent[step + 1][below.start : below.stop], topology.evaluated(step, prompts)
        if len(nodes) < len(above):
            # A node whose step is skipped has been led to a depth beyond: its only child stands in the same place.
            self.states[step + 1][below.start : below.stop] = self.states[step][send(parent, store)]
        memory = memory and memory.rows(parent - above.start)
        for span in chunks(len(nodes), self.max_rows):
            self._families(step, nodes[span.start : span.stop], memory, below.start)
        return memory

    def _families(self, step: int, rows: Tensor, memory: Memory | None, first: int) -> None:
        """The children of some nodes; ``first`` is the node that the memory's first row is of.

        Nothing here but a copy of states to the host waits for the device, so that noise is drawn while it computes.
        """
        topology, sampler, following = self.topology, self.sampler, self.states[step + 1]
        place = torch.full((topology.width(step),), -1).scatter_(0, rows, torch.arange(len(rows)))
        family = place[topology.parent[step + 1]]
        children = torch.nonzero(family >= 0)[:, 0]
        family = family[children]
        latents = fetch_rows(self.states[step], rows, self.device)
        transition, prediction = _transition(self.velocity, sampler, topology, step, rows, latents)
        base = _noise(
            sampler.siblings, topology, step, children.tolist(), self.noise, self.prompt_ids, latents.shape[1:]
        )
        spread = transition.rows(send(family, self.device))
        reached = spread.sample(torch.zeros_like(spread.mean) if base is None else send(base, self.device))
        if memory is not None:
            _solve(sampler, topology, step, children, family, (latents, prediction), reached, memory, first)
        at = send(children, self.device)
        # The states keep these very numbers, so that the gradient pass scores the same.
        self.log_prob[step + 1][at] = spread.log_prob(reached, sampler.reduction)
        following[send(children, following.device)] = reached.to(following.device)


def forwards(topology: Topology, max_rows: int | None, together: int | None = None) -> int:
    """How often ``rollout`` asks for predictions."""
    return sum(
        len(chunks(len(topology.evaluated(step, stage.prompts)), max_rows))
        for stage in stages(topology, together)
        for step in stage.steps
    )


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
    sigma, root = (send(each, latents.device) for each in (sampler.sigmas[depth], topology.root[step][rows]))
    prediction = velocity(latents, sigma, root)
    active, target = topology.stochastic(step)[rows], topology.target(step)[rows]
    return sampler.transition(latents, prediction, depth, active, target), prediction


def _solve(
    sampler: Sampler,
    topology: Topology,
    step: int,
    children: Tensor,
    family: Tensor,
    parents: tuple[Tensor, Tensor],
    reached: Tensor,
    memory: Memory,
    first: int,
) -> None:
    """Take the solver's step instead for the children that come after their prompt's last stochastic step.

    ``parents`` are the parents' latents and predictions, and ``family`` says which of them is each child's.
    ``reached``, by child, and ``memory``, by node from ``first`` on, are changed in place.
    """
    after = topology.per_edge(step, [plan.last_stochastic < step for plan in topology.plans])
    chosen = torch.nonzero(after[children])[:, 0]
    if not len(chosen):
        return
    device, kept_on = reached.device, memory.clean.device
    row = send(family[chosen], device)
    latents, prediction = (part[row] for part in parents)
    nodes = children[chosen]
    target = topology.target(step)[topology.parent[step + 1][nodes]]
    level, level_next = (sampler.sigmas[depth] for depth in (torch.full_like(target, step), target))
    before = Memory(*(fetch_rows(part, nodes - first, device) for part in (memory.clean, memory.sigma)))
    solved, kept = dpm2m(latents, prediction, send(level, device), send(level_next, device), before)
    reached[send(chosen, device)] = solved
    rows = send(nodes - first, kept_on)
    memory.clean[rows], memory.sigma[rows] = kept.clean.to(kept_on), send(level, kept_on)


def _noise(
    siblings: Siblings,
    topology: Topology,
    step: int,
    children: Sequence[int],
    source: NoiseSource,
    prompt_ids: Sequence[int],
    shape: Sequence[int],
) -> Tensor | None:
    """Base noise of some children, ascending, on the CPU; zero where the step is deterministic and needs none drawn.

    None if it is so for all prompts.
    """
    if not any(plan.stochastic[step] for plan in topology.plans):
        return None
    noise = torch.zeros(len(children), *shape)
    for prompt, plan in enumerate(topology.plans):
        if not plan.stochastic[step]:
            continue
        nodes = topology.span(prompt, step + 1)
        # A prompt's nodes adjoin and are all evaluated or none: those among the children are a run of them.
        first, last = bisect_left(children, nodes.start), bisect_left(children, nodes.stop)
        if first >= last:
            continue
        # Noise is addressed by places in the whole tree; of its families a part may lack the first or last children.
        start = children[first] - nodes.start + topology.parts[prompt].held[step + 1].start
        branches, stop = plan.factors[step], start + last - first
        parents = range(start // branches, -(-stop // branches))
        families = child_noise(source, siblings, prompt_ids[prompt], step + 1, parents, branches, shape)
        skipped = start - parents.start * branches
        noise[first:last] = families[skipped : skipped + last - first]
    return noise
