"""Writes the home page's pictures from a finished quickstart: a tree with its leaves, and samples before and after.

Usage: python scripts/build_pictures.py runs/quickstart
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from PIL import Image

from branchtree.report.read import Node, Run, Tree, read_run
from branchtree.report.tree_layout import TreeLayout, lay_out_tree

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, ROW, TOP, LEFT, RIGHT = 760.0, 24.0, 44.0, 24.0, 120.0
GAP = 8  # pixels between samples
LINE, GOOD, POOR = "#7a8a94", (0x1F, 0x5F, 0xB4), (0xC2, 0x57, 0x00)
"""A grey that light and dark pages show, and the colours of a high and a low advantage."""


def tree_svg(run: Run, tree: Tree) -> str:
    """Return a recorded tree as a picture: noise at the left, leaves with their rewards at the right."""
    layout = lay_out_tree(tree)
    rewards = {leaf.node: leaf for leaf in tree.leaves}
    depth = max(node.depth for node in tree.nodes)
    limit = max(abs(node.advantage or 0.0) for node in tree.nodes)
    at = {node.id: _position(layout, node, depth) for node in tree.nodes}
    above = {node.id: node for node in tree.nodes}
    height = max(y for _, y in at.values()) + ROW
    edges, marks = [], []
    for node in tree.nodes:
        x, y = at[node.id]
        if node.parent is not None:
            fromx, fromy = at[above[node.parent].id]
            colour = _colour(node.advantage, limit)
            edges.append(f'<path d="M{fromx:.0f} {fromy:.0f} V{y:.0f} H{x:.0f}" stroke="{colour}"/>')
        if node.id in rewards:
            leaf = rewards[node.id]
            picture = (run.path / "trees" / (leaf.thumbnail or "")).read_bytes()
            data = base64.b64encode(picture).decode()
            marks.append(
                f'<image x="{x + 4:.0f}" y="{y - 10:.0f}" width="20" height="20" href="data:image/png;base64,{data}"/>'
            )
            reward = next(value for value in leaf.rewards.values() if value is not None)
            marks.append(
                f'<text x="{x + 32:.0f}" y="{y + 4:.0f}">{reward:.2f}</text>'.replace("-", "\N{MINUS SIGN}", 1)
            )
    heads = [(at[tree.nodes[0].id][0], "noise"), (WIDTH - RIGHT + 4, "samples and rewards")]
    text = "".join(f'<text x="{x:.0f}" y="18">{word}</text>' for x, word in heads)
    names = "".join(
        f'<text x="{_x(step, depth):.0f}" y="18" text-anchor="middle">split {index + 1}</text>'
        for index, step in enumerate(tree.splits)
        if step
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>A tree of sixteen samples for the prompt: {tree.prompt}</title>'
        f'<g fill="none" stroke-width="2">{"".join(edges)}</g>'
        f'<g fill="{LINE}">{text}{names}{"".join(marks)}</g></svg>\n'
    )


def _position(layout: TreeLayout, node: Node, depth: int) -> tuple[float, float]:
    row = (layout.rows[node.id] - layout.rows[min(layout.rows, key=lambda id: layout.rows[id])]) / layout.row_height
    return _x(node.depth, depth), TOP + ROW * row


def _x(step: int, depth: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / depth


def _colour(advantage: float | None, limit: float) -> str:
    """Return grey for an advantage of 0, and more of blue or orange the further it lies from it."""
    share = min(abs(advantage or 0.0) / (limit or 1.0), 1.0)
    end = GOOD if (advantage or 0.0) > 0 else POOR
    grey = (0x7A, 0x8A, 0x94)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(grey, end, strict=True))


def before_after(run: Run) -> Image.Image:
    """Return the first row of the first grid of samples, and below it that of the last, from the same noises."""
    grids = [Image.open(grid.image).convert("RGB") for grid in (run.samples[0], run.samples[-1])]
    columns, side = run.samples[0].columns, grids[0].width // run.samples[0].columns
    pitch = side + GAP
    picture = Image.new("RGB", (columns * pitch - GAP, 2 * pitch - GAP), "white")
    for row, grid in enumerate(grids):
        for column in range(columns):
            cell = grid.crop((column * side, 0, (column + 1) * side, side))
            picture.paste(cell, (column * pitch, row * pitch))
    return picture


def main() -> None:
    """Write both pictures."""
    run = read_run(Path(sys.argv[1]))
    (IMAGES / "tree.svg").write_text(tree_svg(run, run.trees[-1]), encoding="utf-8")
    before_after(run).quantize(64).save(IMAGES / "quickstart.png", optimize=True)


if __name__ == "__main__":
    main()
