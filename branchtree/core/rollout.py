"""Growing a tree of denoising trajectories: the only loop over steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.grid import check_grid
from branchtree.core.noise import NoiseSource, Siblings
from branchtree.core.solvers import Solver, SolverHistory, dpm2m
from branchtree.core.transfer import fetch_rows, send
from branchtree.core.transitions import Kernel, Reduction, ScalesNoise, ShapesNoise, Transition
from branchtree.core.tree import BranchTree, Topology

CleanSamples = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, *latent), prediction (B, ...), sigma (B,)) -> the clean samples that follow from them (B, *latent)."""

VelocityFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, *latent), sigma (B,), prompt index (B,) int64) -> prediction (B, ...), float32."""


@dataclass(frozen=True)
class Sampler:
    """How transitions are sampled and scored, alike in the rollout and the gradient pass.

    Raises ValueError for a grid that does not fall to 0.
    """

    kernel: Kernel
    siblings: Siblings
    sigmas: Tensor  # (T + 1,) float32, CPU
    reduction: Reduction = "mean"
    solver: Solver = "euler"  # of a prompt's steps after its last stochastic one

    def __post_init__(self) -> None:
        check_grid(self.sigmas)

    def transition(
        self, latents: Tensor, prediction: Tensor, depth: Tensor, active: Tensor, target: Tensor | None = None
    ) -> Transition:
        """The transitions of rows at their own depths (B,), each to its ``target`` depth, by default the one after."""
        target = depth + 1 if target is None else target
        sigma, sigma_next = (send(self.sigmas[d], latents.device) for d in (depth, target))
        return self.kernel(latents, prediction, sigma, sigma_next, send(active, latents.device))

    def noise_shape(self, latent: Sequence[int]) -> Sequence[int]:
        """Return the shape of one row's base noise for states of shape ``latent``."""
        return self.kernel.noise_shape(latent) if isinstance(self.kernel, ShapesNoise) else latent

    def noise_weights(self, depth: Tensor, target: Tensor, active: Tensor) -> Tensor:
        """Return the noise scale of rows' steps (B,) over the mean of the grid's steps that can be stochastic, float32.

        TempFlow-GRPO's noise-aware weights (arXiv 2508.04324, eq. 7): over the grid, at the kernel's own noise, their
        mean is 1. Raises ValueError for a kernel whose noise has no scale.
        """
        if not isinstance(self.kernel, ScalesNoise):
            raise ValueError(f"{type(self.kernel).__name__} has no noise scale to weigh steps by")
        levels = self.sigmas[depth], self.sigmas[target]
        # Where all have the kernel's own noise, so that a kernel need not know of any other.
        own = active.dtype == torch.bool and bool(active.all())
        scale = self.kernel.noise_scale(*levels) if own else self.kernel.noise_scale(*levels, active)
        return scale / self.kernel.noise_scale(self.sigmas[:-2], self.sigmas[1:-1]).mean()

    def noise_scale(self, kernel: ScalesNoise) -> Tensor:
        """Return the standard deviation that each step adds if it is stochastic, (T,) float32; 0 for the last."""
        return torch.cat([kernel.noise_scale(self.sigmas[:-2], self.sigmas[1:-1]), torch.zeros(1)])


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that the nodes of consecutive prompts take in the same batches."""

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


class Growth:
    """Trees of P prompts while they grow. Iterate over it: it takes the steps, and yields prompts that are complete.

    All nodes of a depth are one batch, cut to ``max_rows`` only for memory. What it yields are consecutive prompts and
    their clean latents (L, *latent); once it is exhausted, ``tree`` is the whole.

    Args:
        velocity: the policy's predictions.
        sampler: how transitions are made and scored.
        topology: the trees' shape.
        initial: (P, *latent), the state that all leaves of a prompt start from; integers stay integers.
        noise: the source of the edges' noise.
        prompt_ids: (P,) the prompts' addresses for noise.
        max_rows: predictions in one call; all of a depth by default.
        store: where states are kept; by default where ``initial`` is.
        together: prompts that go on together after the last split; all by default.
        clean: what a prediction says of the clean sample, where the tree is to keep that of every node.

    Raises:
        ValueError: the time grid does not fit the topology, or prompts are missing.
    """

    def __init__(
        self,
        velocity: VelocityFunction,
        sampler: Sampler,
        topology: Topology,
        initial: Tensor,
        noise: NoiseSource,
        prompt_ids: Sequence[int],
        max_rows: int | None = None,
        store: torch.device | None = None,
        together: int | None = None,
        clean: CleanSamples | None = None,
    ) -> None:
        if sampler.sigmas.numel() != topology.steps + 1:
            raise ValueError(
                f"{topology.steps} steps need {topology.steps + 1} noise levels, not {sampler.sigmas.numel()}"
            )
        if not initial.shape[0] == len(prompt_ids) == topology.prompts:
            raise ValueError(f"{topology.prompts} prompts need as many initial noises and prompt ids")
        self._velocity, self._sampler, self._topology = velocity, sampler, topology
        self._noise, self._prompt_ids = noise, prompt_ids
        self._max_rows, self._together, self._device = max_rows, together, initial.device
        # Per depth reached by any prompt, (N_d, *latent) and (N_d,).
        initial = initial.float() if initial.is_floating_point() else initial
        self._states = [initial.to(store or initial.device)]
        self._log_prob = [torch.zeros(topology.prompts, device=initial.device)]
        self._predicts, self._clean = clean, list[Tensor]()  # per depth (N_d, *latent), of nodes that are evaluated

    @property
    def tree(self) -> BranchTree:
        """The tree, once all prompts are complete."""
        # One copy of all densities: each would make the host wait for the device.
        densities = torch.cat(self._log_prob).cpu().split([len(level) for level in self._log_prob])
        return BranchTree(self._topology, self._sampler.sigmas, tuple(self._states), densities, self._clean_samples())

    def _clean_samples(self) -> tuple[Tensor, ...]:
        """Return what is predicted of every node's clean sample, per depth; a node that is skipped has its child's."""
        if self._predicts is None:
            return ()
        levels = [self._states[-1]]
        for depth in reversed(self._topology.depths[:-1]):
            own, parent = self._clean[depth], self._topology.parent[depth + 1]
            skipped = torch.ones(len(own), dtype=torch.bool)
            skipped[self._topology.evaluated(depth)] = False
            below = torch.nonzero(skipped[parent])[:, 0]
            own[send(parent[below], own.device)] = fetch_rows(levels[-1], below, own.device)
            levels.append(own)
        return tuple(reversed(levels))

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        topology = self._topology
        shared = SolverHistory.empty(self._states[0]) if self._sampler.solver == "dpm2m" else None
        for stage in stages(topology, self._together):
            first = topology.block(stage.prompts, stage.steps.start)
            history = shared and shared.rows(torch.arange(first.start, first.stop))
            for step in stage.steps:
                history = self._step(step, stage.prompts, history)
            if stage.steps.stop < topology.steps:
                shared = history
            else:
                leaves = topology.block(stage.prompts, topology.steps)
                yield stage.prompts, self._states[-1][leaves.start : leaves.stop]

    def _step(self, step: int, prompts: range, history: SolverHistory | None) -> SolverHistory | None:
        """Take one step of some prompts; ``history`` is of their nodes before, what is returned of those after."""
        topology, states = self._topology, self._states
        above, below = topology.block(prompts, step), topology.block(prompts, step + 1)
        if step + 1 == len(states):
            states.append(states[0].new_empty(topology.width(step + 1), *states[0].shape[1:]))
            self._log_prob.append(torch.zeros(topology.width(step + 1), device=self._device))
            if self._predicts is not None:
                self._clean.append(torch.empty_like(states[step]))
        parent, nodes = topology.parent[step + 1][below.start : below.stop], topology.evaluated(step, prompts)
        if len(nodes) < len(above):
            # A node whose step is skipped was led to a depth beyond: its only child has its state.
            states[step + 1][below.start : below.stop] = states[step][send(parent, states[0].device)]
        history = history and history.rows(parent - above.start)
        for span in chunks(len(nodes), self._max_rows):
            self._branch(step, nodes[span.start : span.stop], history, below.start)
        return history

    def _branch(self, step: int, rows: Tensor, history: SolverHistory | None, first: int) -> None:
        """Make the children of some nodes; ``first`` is the node that the history's first row is of.

        Nothing here but a copy of states to the host waits for the device, so that noise is drawn while it computes.
        """
        topology, sampler, following = self._topology, self._sampler, self._states[step + 1]
        order = torch.full((topology.width(step),), -1).scatter_(0, rows, torch.arange(len(rows)))
        family = order[topology.parent[step + 1]]
        children = torch.nonzero(family >= 0)[:, 0]
        family = family[children]
        latents = fetch_rows(self._states[step], rows, self._device)
        depth = torch.full((len(rows),), step)
        sigma, root = (send(each, latents.device) for each in (sampler.sigmas[depth], topology.root[step][rows]))
        prediction = self._velocity(latents, sigma, root)
        if self._predicts is not None:
            kept = self._clean[step]
            kept[send(rows, kept.device)] = self._predicts(latents, prediction, sigma).to(kept.device)
        active, target = topology.active(step)[rows], topology.target(step)[rows]
        transition = sampler.transition(latents, prediction, depth, active, target).rows(send(family, self._device))
        shape = sampler.noise_shape(latents.shape[1:])
        base = _noise(sampler.siblings, topology, step, children.tolist(), self._noise, self._prompt_ids, shape)
        reached = transition.sample(None if base is None else send(base, self._device))
        if history is not None:
            _solve(sampler, topology, step, children, family, (latents, prediction), reached, history, first)
        log_prob = transition.log_prob(reached, sampler.reduction)
        if still := torch.nonzero(topology.still(step)[children])[:, 0].tolist():
            calm = sampler.transition(latents, prediction, depth, torch.zeros_like(active), target)
            reached[still] = calm.rows(send(family[still], self._device)).sample(None)
            log_prob[still] = 0
        at = send(children, self._device)
        # The states keep these very numbers, so that the gradient pass scores the same.
        self._log_prob[step + 1][at] = log_prob
        following[send(children, following.device)] = reached.to(following.device)


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
    """Sample the trees of P prompts; see ``Growth``, which takes the same arguments."""
    growth = Growth(velocity, sampler, topology, initial, noise, prompt_ids, max_rows, store)
    for _ in growth:
        pass
    return growth.tree


def forwards(topology: Topology, max_rows: int | None, together: int | None = None) -> int:
    """Return how often ``rollout`` asks for predictions."""
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


def _solve(
    sampler: Sampler,
    topology: Topology,
    step: int,
    children: Tensor,
    family: Tensor,
    parents: tuple[Tensor, Tensor],
    reached: Tensor,
    history: SolverHistory,
    first: int,
) -> None:
    """Take the solver's step instead for the children that come after their prompt's last stochastic step.

    ``parents`` are the parents' latents and predictions, and ``family`` says which of them is each child's.
    ``reached``, by child, and ``history``, by node from ``first`` on, are overwritten.
    """
    after = topology.per_edge(step, [plan.last_stochastic < step for plan in topology.plans])
    chosen = torch.nonzero(after[children])[:, 0]
    if not len(chosen):
        return
    device, kept_on = reached.device, history.clean.device
    row = send(family[chosen], device)
    latents, prediction = (each[row] for each in parents)
    nodes = children[chosen]
    target = topology.target(step)[topology.parent[step + 1][nodes]]
    level, level_next = (sampler.sigmas[depth] for depth in (torch.full_like(target, step), target))
    before = SolverHistory(*(fetch_rows(each, nodes - first, device) for each in (history.clean, history.sigma)))
    solved, kept = dpm2m(latents, prediction, send(level, device), send(level_next, device), before)
    reached[send(chosen, device)] = solved
    rows = send(nodes - first, kept_on)
    history.clean[rows], history.sigma[rows] = kept.clean.to(kept_on), send(level, kept_on)


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
        # A prompt's nodes are consecutive, and all evaluated or none: those among the children are a run of them.
        first, last = bisect_left(children, nodes.start), bisect_left(children, nodes.stop)
        if first >= last:
            continue
        # Noise is addressed by indices in the whole tree; of its families a share may lack the first or last children.
        start = children[first] - nodes.start + topology.shares[prompt].held[step + 1].start
        branches, stop = plan.factors[step], start + last - first
        parents = range(start // branches, -(-stop // branches))
        families = siblings.draw(source, prompt_ids[prompt], step + 1, parents, branches, shape)
        skipped = start - parents.start * branches
        noise[first:last] = families[skipped : skipped + last - first]
    return noise
