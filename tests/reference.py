"""A slow second reading of the method, on linked nodes and Python floats, that the fast code must equal.

Everything here follows the written definition (transition, fusion, advantages, pruning, families, loss, nested
analysis of variance) as literally as possible: recursion over parents and children, one number at a time, nothing
imported from the library. Read it to learn what a figure means; never call it for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

ROUNDING = 1e-12
"""A spread below this part of the largest value is rounding, and counts as none."""
SCORE_ROUNDING = 2e-6
"""The same of values that scores in float32 were fused to, as a part of the largest score of the prompt."""


@dataclass(eq=False)
class Node:
    """One state of one prompt's tree, with the edge that leads into it."""

    prompt: int
    depth: int
    parent: Node | None
    stochastic: bool = False  # the edge into this node
    trained: bool = False  # the edge into this node
    splits_here: bool = False  # whether this node has several children
    log_prob: float = 0.0  # of the edge into this node
    reward: float | None = None  # of a leaf; None where it is masked
    value: float | None = None  # None where no valid leaf lies below
    advantage: float = 0.0
    place: int = -1  # among all nodes of this depth, every prompt together
    children: list[Node] = field(default_factory=list)

    @property
    def is_leaf(self) -> bool:
        return not self.children


def plant(prompt: int, factors: Sequence[int], stochastic: Sequence[bool], trained: Sequence[bool]) -> Node:
    """One prompt's tree: every node of depth i gets factors[i] children."""
    root = Node(prompt=prompt, depth=0, parent=None)
    _sprout(root, factors, stochastic, trained)
    return root


def _sprout(node: Node, factors: Sequence[int], stochastic: Sequence[bool], trained: Sequence[bool]) -> None:
    step = node.depth
    if step == len(factors):
        return
    node.splits_here = factors[step] > 1
    for _ in range(factors[step]):
        child = Node(node.prompt, step + 1, node, stochastic=stochastic[step], trained=trained[step])
        node.children.append(child)
        _sprout(child, factors, stochastic, trained)


def number(roots: Sequence[Node]) -> None:
    """Give every node its place: by prompt, then by parent, then among its siblings."""
    for depth in range(height(roots[0]) + 1):
        for place, node in enumerate(level(roots, depth)):
            node.place = place


def height(node: Node) -> int:
    """Depth of the leaves."""
    return node.depth if node.is_leaf else height(node.children[0])


def walk(node: Node) -> Iterator[Node]:
    """The node and all its descendants."""
    yield node
    for child in node.children:
        yield from walk(child)


def level(roots: Sequence[Node], depth: int) -> list[Node]:
    """All nodes of a depth, in order."""
    if depth == 0:
        return list(roots)
    return [child for node in level(roots, depth - 1) for child in node.children]


def leaves(node: Node) -> list[Node]:
    """The leaves below a node; a leaf is below itself."""
    return [node] if node.is_leaf else [leaf for child in node.children for leaf in leaves(child)]


def valid_leaves(node: Node) -> list[Node]:
    """The leaves below a node whose reward did not fail."""
    return [leaf for leaf in leaves(node) if leaf.reward is not None]


def last_split(root: Node) -> int:
    """The deepest step that splits, -1 if none does."""
    return max((node.depth for node in walk(root) if node.splits_here), default=-1)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def sample_std(values: Sequence[float], rounding: float | None = None) -> float:
    """Sample standard deviation; 0 for fewer than two values and where only rounding differs."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    std = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
    if rounding is None:
        rounding = ROUNDING * max(abs(value) for value in values)
    return std if std > rounding else 0.0


# Transitions: one coordinate at a time, in double precision.

Step = Callable[[float, float, float, float, bool], tuple[float, float]]
"""(state, prediction, sigma, sigma_next, active) -> (mean, std) of the next state."""


def ode_step(x: float, velocity: float, sigma: float, sigma_next: float) -> float:
    return x + velocity * (sigma_next - sigma)


def flow_matching_step(x: float, velocity: float, sigma: float, sigma_next: float, level: float) -> tuple[float, float]:
    """mean = x + (v - g^2 / 2 * score) * D and std = g * sqrt(-D)."""
    step = sigma_next - sigma
    noise_estimate = x + (1 - sigma) * velocity
    score = -noise_estimate / sigma
    return x + (velocity - level**2 / 2 * score) * step, level * math.sqrt(-step)


def dance(eta: float) -> Step:
    def step(x: float, v: float, sigma: float, sigma_next: float, active: bool) -> tuple[float, float]:
        return flow_matching_step(x, v, sigma, sigma_next, eta if active else 0.0)

    return step


def flow(eta: float) -> Step:
    def step(x: float, v: float, sigma: float, sigma_next: float, active: bool) -> tuple[float, float]:
        remaining = 1 - sigma_next if sigma == 1 else 1 - sigma
        return flow_matching_step(x, v, sigma, sigma_next, eta * math.sqrt(sigma / remaining) if active else 0.0)

    return step


def cps(eta: float) -> Step:
    def step(x: float, v: float, sigma: float, sigma_next: float, active: bool) -> tuple[float, float]:
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        angle = (eta if active else 0.0) * math.pi / 2
        centre = (1 - sigma_next) * clean + sigma_next * math.cos(angle) * noise
        return centre, sigma_next * math.sin(angle)

    return step


def ddim(eta: float, prediction: str) -> Step:
    """DDIM's equations 12 and 16, in its own symbol: alpha_bar is the squared signal level."""

    def step(x: float, predicted: float, sigma: float, sigma_next: float, active: bool) -> tuple[float, float]:
        bar, bar_next = 1 - sigma**2, 1 - sigma_next**2
        if prediction == "noise":
            noise = predicted
            clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        else:
            noise = sigma * x + math.sqrt(bar) * predicted
            clean = math.sqrt(bar) * x - sigma * predicted
        variance = (eta**2 if active else 0.0) * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
        direction = math.sqrt(max(1 - bar_next - variance, 0.0))
        return math.sqrt(bar_next) * clean + direction * noise, math.sqrt(variance)

    return step


def gaussian_log_density(x: float, centre: float, std: float) -> float:
    """Log-density of one coordinate; 0 by convention where the step is deterministic."""
    if std == 0:
        return 0.0
    return -((x - centre) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


# Fusion.


def path_log_prob(leaf: Node, node: Node) -> float:
    """Log-density of the path from a node down to a leaf: the sum over its edges."""
    if leaf is node:
        return 0.0
    assert leaf.parent is not None
    return leaf.log_prob + path_log_prob(leaf.parent, node)


def fuse(node: Node, beta: float, scale: str, dimensions: int) -> float | None:
    """V(n): the softmax(beta * path density)-weighted mean of the rewards of the valid leaves below n."""
    below = valid_leaves(node)
    if not below:
        return None
    paths = [path_log_prob(leaf, node) for leaf in below]
    if scale == "sum":
        paths = [path * dimensions for path in paths]
    if scale == "standardised":
        centre, std = mean(paths), sample_std(paths)
        paths = [(path - centre) / std if std > 0 else 0.0 for path in paths]
    largest = max(beta * path for path in paths)
    weights = [math.exp(beta * path - largest) for path in paths]
    total = math.fsum(weights)
    return math.fsum(weight / total * float(leaf.reward or 0.0) for weight, leaf in zip(weights, below, strict=True))


def fuse_all(roots: Sequence[Node], beta: float, scale: str = "mean", dimensions: int = 1) -> None:
    """Give every node its value."""
    for root in roots:
        for node in walk(root):
            node.value = fuse(node, beta, scale, dimensions)


# Advantages. Each reads the nodes' values and sets their advantages.


def _level_values(root: Node, depth: int) -> list[float]:
    return [node.value for node in level([root], depth) if node.value is not None]


def score_rounding(root: Node) -> float:
    """How far apart the rounding of the prompt's scores alone may bring values that should be equal."""
    return SCORE_ROUNDING * max(abs(float(leaf.reward or 0.0)) for leaf in valid_leaves(root))


def depth_advantage(root: Node, node: Node, eps: float) -> float:
    if node.value is None:
        return 0.0
    peers = _level_values(root, node.depth)
    std = sample_std(peers, score_rounding(root))
    return (node.value - mean(peers)) / (std + eps) if std > 0 else 0.0


def leaf_advantage(root: Node, node: Node, eps: float) -> float:
    """Against the mean reward of the prompt's other leaves, over the deviation of all of them."""
    below = valid_leaves(node)
    others = [leaf.reward for leaf in valid_leaves(root) if leaf not in below and leaf.reward is not None]
    if node.value is None or not others:
        return 0.0
    std = sample_std([leaf.reward for leaf in valid_leaves(root) if leaf.reward is not None], score_rounding(root))
    if std == 0:
        return 0.0
    return (node.value - mean(others)) / (std + eps)


def sibling_advantage(root: Node, node: Node, eps: float) -> float:
    """Against the mean of the node and its siblings, over the deviation of the whole depth."""
    if node.value is None or node.parent is None:
        return 0.0
    family = [child.value for child in node.parent.children if child.value is not None]
    std = sample_std(_level_values(root, node.depth), score_rounding(root))
    if std == 0 or sample_std(family, score_rounding(root)) == 0:
        return 0.0
    return (node.value - mean(family)) / (std + eps)


ESTIMATORS: dict[str, Callable[[Node, Node, float], float]] = {
    "depth": depth_advantage,
    "leaf": leaf_advantage,
    "sibling": sibling_advantage,
}


def assign_advantages(roots: Sequence[Node], estimator: str, eps: float, clip: float = math.inf) -> None:
    for root in roots:
        for node in walk(root):
            node.advantage = min(max(ESTIMATORS[estimator](root, node, eps), -clip), clip)


# Pruning. Each says whether the edge into a node is kept.

Keep = Callable[[Node], bool]


def keep_all(roots: Sequence[Node]) -> Keep:
    return lambda node: node.parent is not None


def parent_top1(roots: Sequence[Node]) -> Keep:
    """At the last split, per parent, only the best child keeps the edges after the split."""
    kept: set[Node] = set()
    for root in roots:
        split = last_split(root)
        for node in walk(root):
            if node.depth <= split + 1:
                kept.add(node)
        if split < 0:
            kept.update(walk(root))
        for parent in level([root], max(split, 0)):
            candidates = [child for child in parent.children if child.value is not None]
            if candidates:
                kept.update(walk(max(candidates, key=lambda child: float(child.value or 0.0))))
    return lambda node: node.parent is not None and node in kept


def extreme(roots: Sequence[Node], count: int) -> Keep:
    """The best and worst ``count`` leaves by reward keep the edges after the last split."""
    kept: set[Node] = set()
    for root in roots:
        split = last_split(root)
        kept.update(node for node in walk(root) if node.depth <= split + 1)
        ranked = sorted(valid_leaves(root), key=lambda leaf: float(leaf.reward or 0.0))
        for leaf in [*ranked[:count], *ranked[-count:]]:
            node: Node | None = leaf
            while node is not None:
                kept.add(node)
                node = node.parent
    return lambda node: node.parent is not None and node in kept


def outside_depth_window(roots: Sequence[Node], size: int, every: int, stop: int, iteration: int) -> Keep:
    """All edges but those of a window of steps from the last split, one step deeper every ``every`` iterations."""
    first = {}
    for root in roots:
        start = max(last_split(root), 0)
        first[root.prompt] = start
        for _ in range(iteration // every):
            first[root.prompt] += first[root.prompt] < stop
    return lambda node: (
        node.parent is not None and not (first[node.prompt] <= node.depth - 1 < first[node.prompt] + size)
    )


# Families, and the loss.


def trained_edges(roots: Sequence[Node], keep: Keep, kl: bool = False) -> list[Node]:
    """The nodes whose incoming edge is trained, by depth: stochastic, allowed, kept, and with an advantage or a KL."""
    chosen = []
    for depth in range(1, height(roots[0]) + 1):
        for node in level(roots, depth):
            if node.stochastic and node.trained and keep(node) and (kl or node.advantage != 0):
                chosen.append(node)
    return chosen


def families(roots: Sequence[Node], keep: Keep, kl: bool = False) -> list[tuple[Node, list[Node]]]:
    """The trained edges by parent, parents ordered by depth and place."""
    chosen = trained_edges(roots, keep, kl)
    parents: list[Node] = []
    for node in chosen:
        assert node.parent is not None
        if node.parent not in parents:
            parents.append(node.parent)
    return [(parent, [node for node in chosen if node.parent is parent]) for parent in parents]


def clipped_loss(new: float, old: float, advantage: float, clip: float) -> float:
    """-min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)."""
    rho = math.exp(new - old)
    return -min(rho * advantage, max(1 - clip, min(rho, 1 + clip)) * advantage)


# Nested analysis of variance.


@dataclass(frozen=True)
class Variance:
    share: list[float]
    independent_share: list[float]
    component: list[float]


def split_variance(roots: Sequence[Node]) -> Variance | None:
    """Where the leaf rewards' variance arises, pooled over prompts: one entry per split.

    The units of level j are the children of split j; level 0 is the prompt. With n_m the valid leaves below unit m
    and e_k the (independent, zero-mean) effect of level k, a unit's mean is the sum over k of
    sum_q n_q / n_m * e_k(q), so

        E sum_l (mean of l's level-j unit - mean of its level-(j-1) unit)^2
            = sum over k >= j of component_k * (sum_m sum_{q in m} n_q^2 / n_m - sum_M sum_{q in M} n_q^2 / n_M).
    """
    levels = max(len(_split_depths(root)) for root in roots)
    squares, freedom = [0.0] * levels, [0.0] * levels
    coefficient = [[0.0] * levels for _ in range(levels)]
    for root in roots:
        if not valid_leaves(root):
            continue
        depths = [0, *(depth + 1 for depth in _split_depths(root))]
        units = [[node for node in level([root], depth) if valid_leaves(node)] for depth in depths]
        for j in range(1, len(depths)):
            freedom[j - 1] += len(units[j]) - len(units[j - 1])
            for outer in units[j - 1]:
                for inner in units[j]:
                    if inner in list(walk(outer)):
                        difference = _mean_reward(inner) - _mean_reward(outer)
                        squares[j - 1] += len(valid_leaves(inner)) * difference**2
            for k in range(j, len(depths)):
                coefficient[j - 1][k - 1] += _concentration(units[j], units[k])
                coefficient[j - 1][k - 1] -= _concentration(units[j - 1], units[k])
    if math.fsum(squares) == 0 or min(freedom) == 0:
        return None
    component = [0.0] * levels
    for j in reversed(range(levels)):
        deeper = math.fsum(coefficient[j][k] * component[k] for k in range(j + 1, levels))
        component[j] = (squares[j] - deeper) / coefficient[j][j]
    return Variance(*([part / math.fsum(parts) for part in parts] for parts in (squares, freedom, component)))


def _split_depths(root: Node) -> list[int]:
    return sorted({node.depth for node in walk(root) if node.splits_here})


def _mean_reward(node: Node) -> float:
    return mean([leaf.reward for leaf in valid_leaves(node) if leaf.reward is not None])


def _concentration(outer: Sequence[Node], inner: Sequence[Node]) -> float:
    total = 0.0
    for unit in outer:
        below = set(walk(unit))
        for part in inner:
            if part in below:
                total += len(valid_leaves(part)) ** 2 / len(valid_leaves(unit))
    return total
