"""What a person looks at: grids of samples from fixed noises, and recorded trees with thumbnails."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from branchtree.credit import Credit
from branchtree.families import trained_edges
from branchtree.protocols import Media, Scores
from branchtree.training.rundir import write_atomically
from branchtree.tree import Topology

COLUMNS = 10
THUMBNAIL = 96  # pixels of a thumbnail's longer side
TILE = 256  # the same in a grid; small images are enlarged to a quarter of it


def to_image(pixels: Tensor) -> Image.Image:
    """One image (C, H, W) in [0, 1], C being 3 or 1; of a video (F, C, H, W) its middle frame."""
    frame = pixels[pixels.shape[0] // 2] if pixels.ndim == 4 else pixels
    array = (frame.expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Shrink so that the longer side is at most ``side``; enlarge by whole numbers while it is below a quarter."""
    longest = max(image.size)
    if longest > side:
        return image.resize([max(1, round(length * side / longest)) for length in image.size], Image.Resampling.LANCZOS)
    factor = max(1, side // 4 // longest)
    return image.resize([length * factor for length in image.size], Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    """An image as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_grid(folder: Path, iteration: int, media: Sequence[Media], prompts: Sequence[str]) -> None:
    """Write ``iteration_NNNNNN.png``, a grid of samples row by row, and a .json with their prompts."""
    tiles = [fitted(to_image(pixels), TILE) for part in media for pixels in part.pixels]
    columns = min(COLUMNS, len(tiles))
    width, height = tiles[0].size
    grid = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for place, tile in enumerate(tiles):
        grid.paste(tile, (place % columns * width, place // columns * height))
    stem = folder / f"iteration_{iteration:06d}"
    write_atomically(stem.with_suffix(".png"), png(grid))
    index = {"iteration": iteration, "prompts": list(prompts), "columns": columns}
    write_atomically(stem.with_suffix(".json"), json.dumps(index).encode())


def write_tree(
    folder: Path,
    iteration: int,
    prompt: str,
    topology: Topology,
    scores: Mapping[str, Scores],
    credit: Credit,
    media: Sequence[Media],
) -> None:
    """Record the first prompt's tree: its nodes with values and advantages, its leaves, ``media``, as thumbnails."""
    stem = folder / f"iteration_{iteration:06d}"
    pixels = [image for part in media for image in part.pixels]
    for place, image in enumerate(pixels):
        write_atomically(stem / f"leaf_{place:03d}.png", png(fitted(to_image(image), THUMBNAIL)))
    record = {
        "iteration": iteration,
        "prompt": prompt,
        "steps": topology.steps,
        "splits": list(topology.plans[0].splits),
        "nodes": _nodes(topology, credit),
        "leaves": _leaves(topology, scores, credit, stem.name),
    }
    write_atomically(stem.with_suffix(".json"), json.dumps(record).encode())


def _offsets(topology: Topology) -> list[int]:
    """Id of the first prompt's first node at each depth, counted from the root downwards."""
    widths = topology.plans[0].widths
    return [sum(widths[:depth]) for depth in topology.depths]


def _nodes(topology: Topology, credit: Credit) -> list[dict[str, Any]]:
    plan, offsets = topology.plans[0], _offsets(topology)
    values = next(iter(credit.values.values()))
    trained = trained_edges(topology, credit.advantages, credit.keep)
    return [
        {
            "id": offsets[depth] + node,
            "depth": depth,
            "parent": None if depth == 0 else offsets[depth - 1] + int(topology.parent[depth][node]),
            "value": float(values.value[depth][node]) if bool(values.valid[depth][node]) else None,
            "advantage": float(credit.advantages[depth][node]) if depth else None,
            "trained": bool(trained[depth][node]),
            "stochastic": depth > 0 and plan.stochastic[depth - 1],
        }
        for depth in topology.depths
        for node in range(plan.widths[depth])
    ]


def _leaves(topology: Topology, scores: Mapping[str, Scores], credit: Credit, folder: str) -> list[dict[str, Any]]:
    first = _offsets(topology)[-1]
    return [
        {
            "node": first + leaf,
            "rewards": {
                label: float(score.values[leaf]) if bool(score.valid[leaf]) else None for label, score in scores.items()
            },
            "valid": bool(credit.valid[leaf]),
            "thumbnail": f"{folder}/leaf_{leaf:03d}.png",
        }
        for leaf in range(topology.plans[0].leaves)
    ]
