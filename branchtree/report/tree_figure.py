"""A recorded tree as SVG with a legend, and its leaves as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from branchtree.report.images import Picture
from branchtree.report.markup import escape, number, signed, table
from branchtree.report.read import Leaf, Node, Run, Tree
from branchtree.report.thumbnails import Thumbnails, read_thumbnails
from branchtree.report.tree_layout import TOP, TreeLayout, lay_out_tree

# Blue to orange through grey, which readers with any of the common colour deficiencies can distinguish.
NEGATIVE, NEUTRAL, POSITIVE = (0xC2, 0x57, 0x00), (0xE4, 0xE4, 0xE0), (0x1F, 0x5F, 0xB4)
MOST_TREES = 12  # the most trees on a page
LEAF_GAP, LETTER, LINE = 20.0, 6.3, 13.0


@dataclass(frozen=True)
class _Drawing:
    layout: TreeLayout
    leaves: Mapping[int, Leaf]
    pictures: Thumbnails
    limit: float  # the largest |advantage|: the end of the colour scale
    name: str

    @property
    def side(self) -> float:
        """The height of a leaf's picture."""
        return self.layout.row_height - 4

    @property
    def aspect(self) -> float:
        """The width of the widest picture over its height, between 1 and 2."""
        widest = max((picture.width / picture.height for picture in self.pictures.values()), default=1.0)
        return max(1.0, min(widest, 2.0))


def tree_figures(run: Run) -> str:
    """Return a folded figure for each recorded tree, the last one open; if there are many, evenly spaced ones."""
    trees = thinned(run.trees, MOST_TREES)
    note = ""
    if len(trees) < len(run.trees):
        note = f'<p class="lead">{len(trees)} of {len(run.trees)} recorded trees are shown.</p>'
    pictures = read_thumbnails(run, trees)
    return note + "".join(
        _disclosure(tree, found, index, tree is trees[-1])
        for index, (tree, found) in enumerate(zip(trees, pictures, strict=True))
    )


def thinned(trees: Sequence[Tree], most: int) -> list[Tree]:
    """Return at most ``most`` trees, evenly spaced, including the first and the last."""
    if len(trees) <= most:
        return list(trees)
    return [trees[round(index * (len(trees) - 1) / (most - 1))] for index in range(most)]


def _disclosure(tree: Tree, pictures: Thumbnails, index: int, is_open: bool) -> str:
    drawing = _Drawing(
        layout=lay_out_tree(tree),
        leaves={leaf.node: leaf for leaf in tree.leaves},
        pictures=pictures,
        limit=max((abs(node.advantage) for node in tree.nodes if node.advantage is not None), default=0.0),
        name=f"tree-{index}",
    )
    title = f'Iteration {tree.iteration}: <q class="prompt">{escape(tree.prompt)}</q>'
    return (
        f'<details class="tree"{" open" if is_open else ""}><summary>{title}</summary>'
        f"{_legend(drawing)}{_stop(drawing)}"
        f'<div class="scroll" role="region" aria-label="Tree of iteration {tree.iteration}" tabindex="0">'
        f"{tree_figure_svg(drawing)}</div>{_leaf_table(drawing)}</details>"
    )


def tree_figure_svg(drawing: _Drawing) -> str:
    """Return the tree as an ``svg`` element at its natural size."""
    layout, tree = drawing.layout, drawing.layout.tree
    label = max((len(line) for leaf in tree.leaves for line in _lines(layout, leaf)), default=0)
    width = layout.right + LEAF_GAP + drawing.side * drawing.aspect + 12 + max(label, 10) * LETTER
    height = layout.bottom + 10
    by_id = {node.id: node for node in tree.nodes}
    edges = [_edge(layout, by_id[node.parent], node) for node in tree.nodes if node.parent is not None]
    return (
        f'<svg class="treefig" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img" aria-label="{escape(_alt(tree))}">{"".join(_axis(layout))}<g class="edges">{"".join(edges)}</g>'
        f'<g class="nodes">{"".join(_node(drawing, node) for node in tree.nodes)}</g>'
        f"{''.join(_leaf(drawing, by_id[leaf.node], leaf) for leaf in tree.leaves)}</svg>"
    )


def colour(advantage: float | None, limit: float) -> str:
    """Return the fill of a node; the scale is symmetric about 0 and ends at ``limit``."""
    if advantage is None:
        return "none"
    relative = 0.0 if limit == 0 else max(-1.0, min(1.0, advantage / limit))
    end = POSITIVE if relative > 0 else NEGATIVE
    mixed = (round(middle + abs(relative) * (far - middle)) for middle, far in zip(NEUTRAL, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _alt(tree: Tree) -> str:
    steps = max(node.depth for node in tree.nodes)
    splits = ", ".join(str(step) for step in tree.splits) or "none"
    trained = sum(node.trained for node in tree.nodes if node.parent is not None)
    edges = sum(node.parent is not None for node in tree.nodes)
    return (
        f"Tree with {len(tree.nodes)} nodes, {steps} steps and {len(tree.leaves)} leaves; splits at steps: {splits}; "
        f"{trained} of {edges} edges trained. The leaves are listed in the table below."
    )


def _axis(layout: TreeLayout) -> list[str]:
    """Return depth numbers, a mark for each step by whether it draws noise, and shaded columns where it does not."""
    elements = []
    for depth, x in enumerate(layout.columns):
        elements.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 22}" text-anchor="middle">{depth}</text>')
    ends = [node for node in layout.tree.nodes if node.depth > 0]
    noisy = {node.depth - 1 for node in ends if node.stochastic}
    for step, (x, following) in enumerate(zip(layout.columns, layout.columns[1:], strict=False)):
        wide = following - x
        kind, words = ("noise", "draws noise") if step in noisy else ("still", "is deterministic")
        if step not in noisy:
            box = f'x="{x + 1:.1f}" y="{TOP - 12}" width="{wide - 2:.1f}" height="{layout.bottom - TOP + 14:.1f}"'
            elements.append(f'<rect class="column" {box}/>')
        ribbon = f'x="{x + 2:.1f}" y="{TOP - 16}" width="{wide - 4:.1f}" height="5" rx="2"'
        elements.append(f'<rect class="{kind}" data-step="{step}" {ribbon}><title>step {step} {words}</title></rect>')
        if (factor := layout.splits_at(step)) > 1:
            text = f"split into {factor}"
            elements.append(
                f'<text class="split" x="{x + wide / 2:.1f}" y="{TOP - 42}" text-anchor="middle">{text}</text>'
            )
    elements.append(f'<text class="tick" x="4" y="{TOP - 22}">depth</text>')
    return elements


def _edge(layout: TreeLayout, parent: Node, child: Node) -> str:
    (x0, y0), (x1, y1) = layout.position(parent), layout.position(child)
    kind = "edge" if child.trained else "edge untrained"
    if y0 == y1:
        path = f"M{x0:.1f} {y0:.1f}H{x1:.1f}"
    else:
        turn = x0 + 0.5 * (x1 - x0)
        bend = (x0 + turn) / 2
        path = f"M{x0:.1f} {y0:.1f}C{bend:.1f} {y0:.1f} {bend:.1f} {y1:.1f} {turn:.1f} {y1:.1f}H{x1:.1f}"
    return f'<path class="{kind}" data-child="{child.id}" d="{path}"/>'


def _node(drawing: _Drawing, node: Node) -> str:
    layout = drawing.layout
    x, y = layout.position(node)
    first = node.parent is None or layout.splits_at(node.depth - 1) > 1  # where a value is new
    radius = 6 if first or not layout.children[node.id] else 3.6
    facts = [
        f"node {node.id}, depth {node.depth}",
        f"value {number(node.value)}",
        f"advantage {signed(node.advantage)}",
    ]
    if node.parent is not None:
        facts.append("trained" if node.trained else "not trained")
        facts.append("stochastic step" if node.stochastic else "deterministic step")
    fill = colour(node.advantage, drawing.limit)
    empty = "" if node.advantage is not None else ' class="unknown"'
    text = ""
    if first:
        text = f'<text x="{x - 10:.1f}" y="{y - 5:.1f}" text-anchor="end">{number(node.value, 3)}</text>'
    title = escape("\n".join(facts))
    return (
        f'<g class="node" data-node="{node.id}"><title>{title}</title>'
        f'<circle{empty} cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>{text}</g>'
    )


def _leaf(drawing: _Drawing, node: Node, leaf: Leaf) -> str:
    x, y = drawing.layout.position(node)
    x += LEAF_GAP - 4
    side, wide = drawing.side, drawing.side * drawing.aspect
    picture = drawing.pictures.get(leaf.node)
    title = f"<title>leaf {leaf.node}: {escape(', '.join(_rewards(leaf)))}</title>"
    box = f'x="{x:.1f}" y="{y - side / 2:.1f}" width="{wide:.0f}" height="{side:.0f}"'
    shown = f'<rect class="missing" {box}/>' if picture is None else _shown(picture, box)
    lines = _lines(drawing.layout, leaf)
    text = "".join(
        f'<text x="{x + wide + 8:.1f}" y="{y + 4 + (index - (len(lines) - 1) / 2) * LINE:.1f}">{escape(line)}</text>'
        for index, line in enumerate(lines)
    )
    return f'<g class="leaf{"" if leaf.valid else " invalid"}" data-leaf="{leaf.node}">{title}{shown}{text}</g>'


def _shown(picture: Picture, box: str) -> str:
    """Return a picture, and for an animation also its still: the style sheet shows one of the two."""
    kind = "pixels" if max(picture.width, picture.height) <= 64 else "photo"
    if picture.still is None:
        return f'<image class="{kind}" {box} href="{picture.uri}"/>'
    return (
        f'<image class="{kind} moving" {box} href="{picture.uri}"/>'
        f'<image class="{kind} resting" {box} href="{picture.still}"/>'
    )


def _stop(drawing: _Drawing) -> str:
    """Return a checkbox that stops animations without a script; hidden if the reader's settings already stop them."""
    if all(picture.still is None for picture in drawing.pictures.values()):
        return ""
    return '<p class="switch stop"><label><input type="checkbox" class="rest">hold the leaves still</label></p>'


def _rewards(leaf: Leaf) -> list[str]:
    if not leaf.valid:
        return ["reward failed"]
    return [f"{label} {number(reward, 3)}" for label, reward in leaf.rewards.items()]


def _lines(layout: TreeLayout, leaf: Leaf) -> list[str]:
    """Return a leaf's rewards in lines, or in one line if its row is too low for several."""
    rewards = _rewards(leaf)
    return rewards if len(rewards) * LINE <= layout.row_height else [", ".join(rewards)]


def _legend(drawing: _Drawing) -> str:
    limit = drawing.limit
    ends = ", ".join(colour(side, 1.0) for side in (-1.0, 0.0, 1.0))
    return (
        '<p class="legend tree-legend"><span>advantage '
        f'{number(-limit, 3)}<i class="scale" style="background:linear-gradient(90deg, {ends})"></i>{signed(limit, 3)}'
        '</span><span><i class="mark line"></i>trained edge</span>'
        '<span><i class="mark dashed"></i>not trained</span>'
        '<span><i class="mark ribbon"></i>step that draws noise</span>'
        '<span><i class="mark ribbon still"></i>deterministic step</span>'
        "<span>numbers: fused values; hover over a node for its figures</span></p>"
    )


def _leaf_table(drawing: _Drawing) -> str:
    by_id = {node.id: node for node in drawing.layout.tree.nodes}
    leaves = drawing.layout.tree.leaves
    if not leaves:
        return ""
    labels = list(dict.fromkeys(label for leaf in leaves for label in leaf.rewards))
    rows = []
    for leaf in leaves:
        node = by_id[leaf.node]
        rewards = [number(leaf.rewards.get(label)) for label in labels]
        rows.append(
            [str(leaf.node), *rewards, "yes" if leaf.valid else "no", number(node.value), signed(node.advantage)]
        )
    heads = ["Leaf", *(escape(label) for label in labels), "Valid", "Value", "Advantage"]
    caption = f"Leaves of the tree of iteration {drawing.layout.tree.iteration}"
    return f"<details><summary>Leaves as a table</summary>{table(caption, heads, rows)}</details>"
