"""Files for people to look at: grids of samples from fixed noises, and recorded trees with thumbnails."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from branchtree.core.credit import Credit
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.files.writing import write_atomically
from branchtree.pictures.still import THUMBNAIL, TILE, fitted, png, tiled, to_image
from branchtree.pictures.video import mp4, spread_evenly, webp
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.saved import write_samples
from branchtree.plugins.values import Condition

COLUMNS = 10  # of a grid of images
STRIP, GAP = 8, 2  # the most frames in a sample's strip; pixels between them
LONGEST_VIDEO = 4096  # pixels: the longest side that common H.264 decoders take
ASSUMED_FPS = 8.0  # for a video whose model does not state its rate


def drawn(samples: Sequence[Samples], conditions: Sequence[Condition]) -> list[Media]:
    """Return pictures of samples, batch by batch, as their kind draws them; none of a kind that cannot be drawn."""
    shown, rest = [], list(conditions)
    for batch in samples:
        shown.append(batch.show(rest[: len(batch)]))
        rest = rest[len(batch) :]
    return [media for media in shown if media is not None]


def write_contents(stem: Path, samples: Sequence[Samples], conditions: Sequence[Condition]) -> None:
    """Write samples of another kind than media, and their conditions, into ``stem.safetensors``.

    Images and videos are files of their own.
    """
    whole = samples[0].concatenate(samples)
    if not isinstance(whole, Media):
        write_samples(stem.with_suffix(".safetensors"), whole, conditions)


def write_grid(folder: Path, iteration: int, samples: Sequence[Samples], conditions: Sequence[Condition]) -> None:
    """Write samples and, last, ``iteration_NNNNNN.json`` with their prompts.

    ``iteration_NNNNNN.png`` has images in a grid, row by row, or one strip of frames per video. For videos the .mp4
    beside it is the grid of all samples playing, and ``iteration_NNNNNN/sample_NNN.mp4`` has each separately. What
    samples of other kinds consist of is in ``iteration_NNNNNN.safetensors``.
    """
    path = sample_index(folder, iteration)
    stem = path.with_suffix("")
    write_contents(stem, samples, conditions)
    media = drawn(samples, conditions)
    layout = write_pictures(stem, media) if media else {}
    index = {"iteration": iteration, "prompts": [condition.prompt for condition in conditions], **layout}
    write_atomically(path, json.dumps(index).encode())


def sample_index(folder: Path, iteration: int) -> Path:
    """Return the path of the file that is written last of an iteration's samples."""
    return folder / f"iteration_{iteration:06d}.json"


def write_pictures(stem: Path, media: Sequence[Media], columns: int | None = None) -> dict[str, Any]:
    """Write the pictures of ``write_grid`` under names that begin with ``stem``, and return their layout.

    ``columns`` is the number of samples in a row, also for the strips of videos; it is chosen here by default.
    """
    write = _write_videos if media[0].modality == "video" else _write_images
    return write(stem, media, columns)


def _write_images(stem: Path, media: Sequence[Media], columns: int | None) -> dict[str, Any]:
    tiles = [fitted(to_image(image), TILE) for batch in media for image in batch.pixels]
    columns = columns or min(COLUMNS, len(tiles))
    write_atomically(stem.with_suffix(".png"), png(tiled(tiles, columns)))
    return {"columns": columns}


def _write_videos(stem: Path, media: Sequence[Media], columns: int | None) -> dict[str, Any]:
    strips_in_row = columns or 1
    columns = columns or math.ceil(math.sqrt(sum(map(len, media))))
    side, fps = min(TILE, LONGEST_VIDEO // columns), _fps(media[0])
    tiles = []  # the frames of each sample
    for index, video in enumerate(video for batch in media for video in batch.pixels):
        frames = [to_image(frame) for frame in video]
        whole = max(TILE, *frames[0].size)  # in its own file a sample is never shrunk
        write_atomically(stem / f"sample_{index:03d}.mp4", mp4((fitted(frame, whole) for frame in frames), fps))
        tiles.append([fitted(frame, side) for frame in frames])
    write_atomically(stem.with_suffix(".mp4"), mp4((tiled(each, columns) for each in zip(*tiles, strict=True)), fps))
    shown = spread_evenly(len(tiles[0]), STRIP)
    strips = tiled([frames[index] for frames in tiles for index in shown], strips_in_row * len(shown), GAP)
    write_atomically(stem.with_suffix(".png"), png(strips))
    return {"columns": columns, "kind": "video", "fps": fps, "frames": len(tiles[0]), "strip": shown}


def _fps(media: Media) -> float:
    return ASSUMED_FPS if media.fps is None else float(media.fps)


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of one sample, as a file's content: PNG, or animated WebP for a video."""

    content: bytes
    suffix: str


def make_thumbnails(media: Sequence[Media]) -> list[Thumbnail]:
    """Return a thumbnail of each sample of ``media``."""
    return [
        Thumbnail(_thumbnail(pixels, batch), ".webp" if batch.modality == "video" else ".png")
        for batch in media
        for pixels in batch.pixels
    ]


def write_tree(
    folder: Path,
    iteration: int,
    prompt: str,
    topology: Topology,
    scores: Mapping[str, Scores],
    credit: Credit,
    thumbnails: Sequence[Thumbnail],
) -> None:
    """Write the first prompt's tree: its nodes with values and advantages, and its leaves with thumbnails, if any."""
    stem = folder / f"iteration_{iteration:06d}"
    leaves = topology.plans[0].leaves
    names: list[str | None] = [None] * leaves
    for leaf, thumbnail in zip(range(leaves) if thumbnails else (), thumbnails, strict=True):
        path = stem / f"leaf_{leaf:03d}{thumbnail.suffix}"
        names[leaf] = path.relative_to(folder).as_posix()
        write_atomically(path, thumbnail.content)
    record = {
        "iteration": iteration,
        "prompt": prompt,
        "steps": topology.steps,
        "splits": list(topology.plans[0].splits),
        "nodes": _nodes(topology, credit),
        "leaves": _leaves(topology, scores, credit, names),
    }
    write_atomically(stem.with_suffix(".json"), json.dumps(record).encode())


def _thumbnail(pixels: Tensor, media: Media) -> bytes:
    """Return the content of the thumbnail's file for one sample (C, H, W) or (F, C, H, W) of ``media``."""
    if media.modality == "image":
        return png(fitted(to_image(pixels), THUMBNAIL))
    return webp([fitted(to_image(frame), THUMBNAIL) for frame in pixels], _fps(media))


def _offsets(topology: Topology) -> list[int]:
    """Return the id of the first prompt's first node at each depth; ids count from the root downwards."""
    widths = topology.plans[0].widths
    return [sum(widths[:depth]) for depth in topology.depths]


def _nodes(topology: Topology, credit: Credit) -> list[dict[str, Any]]:
    plan, offsets = topology.plans[0], _offsets(topology)
    values = next(iter(credit.values.values()))
    trained = credit.trained(topology)
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


def _leaves(
    topology: Topology, scores: Mapping[str, Scores], credit: Credit, thumbnails: Sequence[str | None]
) -> list[dict[str, Any]]:
    first = _offsets(topology)[-1]
    return [
        {
            "node": first + leaf,
            "rewards": {
                label: float(score.values[leaf]) if bool(score.valid[leaf]) else None for label, score in scores.items()
            },
            "valid": bool(credit.valid[leaf]),
            "thumbnail": thumbnail,
        }
        for leaf, thumbnail in enumerate(thumbnails)
    ]
