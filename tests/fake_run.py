"""Builds a run directory as training writes it, out of made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fake_videos
import yaml
from PIL import Image, ImageDraw

PROMPTS = [f"a handwritten {digit}" for digit in ["zero", "one", "two", "three", "four", "five", "six", "seven"]]
STEPS, SPLITS = 20, (0, 3, 6, 9)
ROLLOUT_ROWS, GRADIENT_ROWS = 226, 196


def build_run(
    folder: Path,
    iterations: int = 60,
    planned: int | None = None,
    prompts: Sequence[str] = PROMPTS,
    every: int = 20,
    steps: int = STEPS,
    splits: Sequence[int] = SPLITS,
    labels: Sequence[str] = ("digits",),
    video: bool = False,
) -> Path:
    """A finished run, or, where more iterations are planned than were done, one that stopped on the way."""
    planned = iterations if planned is None else planned
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(planned, prompts), sort_keys=False))
    write_lines(folder / "metrics.jsonl", [metrics(i, iterations, rng, len(splits), labels) for i in range(iterations)])
    write_lines(folder / "timing.jsonl", [timing(i, rng) for i in range(iterations)])
    done = [i for i in range(0, planned + 1, every) if i <= iterations]
    write_lines(folder / "evaluation.jsonl", [evaluation(i, planned) for i in done])
    for i in done:
        (video_samples if video else samples)(folder / "samples", i, i / planned, prompts)
    for i in [i for i in done if i < iterations]:
        tree(folder / "trees", i, i / planned, prompts[i % len(prompts)], steps, splits, labels, video)
    if iterations == planned:
        rows = {"rollout": iterations * ROLLOUT_ROWS, "gradient": iterations * GRADIENT_ROWS}
        summary = {"iterations": iterations, "seconds": 741.5, "device": "cpu", "rows": rows}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(planned: int, prompts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": "digits-branch",
        "description": "A small flow-matching model of handwritten digits, trained to draw the digit it is asked for.",
        "seed": 42,
        "model": {"adapter": "flux", "path": "models/small-flux"},
        "lora": None,
        "tree": {"steps": STEPS, "splits": list(SPLITS), "branches": 2, "siblings": "correlated", "sde": "splits"},
        "rewards": [{"reward": "digits", "weight": 1.0, "label": "digits"}],
        # A recipe that holds half a character is never run.
        "data": {"prompts": [prompt.encode(errors="replace").decode() for prompt in prompts]},
        "run": {"iterations": planned, "precision": "fp32"},
    }


def metrics(iteration: int, total: int, rng: random.Random, splits: int, labels: Sequence[str]) -> dict[str, Any]:
    part = iteration / max(total, 1)
    level = -1.9 + 1.5 * (1 - math.exp(-3 * part))
    shares = [0.31, 0.29, 0.22, 0.18, 0.1, 0.1][:splits]
    row: dict[str, Any] = {
        "iteration": iteration,
        "reward/valid_fraction": 1.0,
        "loss": rng.gauss(0, 2e-5),
        "grad_norm": 0.4 + 0.1 * rng.random(),
        "lr": 1e-4,
        "ratio/max_deviation": 3e-4 + 2e-4 * rng.random(),
        "ratio/clipped_fraction": None if iteration == 3 else 0.2 * rng.random(),
        "log_prob/mismatch_mean": 1e-8 * rng.random(),
        "log_prob/mismatch_max": 1e-7 * rng.random(),
        "rows/rollout": ROLLOUT_ROWS,
        "rows/gradient": GRADIENT_ROWS,
        "rows/equivalent": ROLLOUT_ROWS + 3 * GRADIENT_ROWS,
        "edges/trained": 226,
        "leaves/scored": 32,
    }
    for label in labels:
        row[f"reward/{label}/mean"] = level + rng.gauss(0, 0.12)
        row[f"reward/{label}/std"] = 0.6 - 0.3 * part + abs(rng.gauss(0, 0.05))
    for depth in range(1, STEPS):
        row[f"advantage/abs_mean/depth_{depth:02d}"] = 0.75 + 0.1 * rng.random()
        row[f"loss_share/depth_{depth:02d}"] = min(2.0 ** min(depth, 4), 16) / 250
    for split in range(splits):
        row[f"variance/share/split_{split}"] = shares[split]
        row[f"variance/independent_share/split_{split}"] = 2**split / (2**splits - 1)
        row[f"variance/component/split_{split}"] = shares[split] * 1.1 - 0.025
        row[f"spread/split_{split}"] = 0.4 / (split + 1)
    return row


def timing(iteration: int, rng: random.Random) -> dict[str, Any]:
    phases = {"rollout": 4.1, "decode": 0.6, "reward": 0.3, "credit": 0.05, "update": 7.2, "other": 0.1}
    taken = {phase: seconds * (0.9 + 0.2 * rng.random()) for phase, seconds in phases.items()}
    return {"iteration": iteration, **taken, "total": sum(taken.values())}


def evaluation(iteration: int, planned: int) -> dict[str, Any]:
    part = iteration / planned
    figures = {
        "digits": {"mean": -1.8123 + 1.4 * part, "valid": 640, "samples": 640},
        "accuracy": {"mean": 0.5125 + 0.37 * part, "valid": 638, "samples": 640},
    }
    return {"iteration": iteration, "figures": figures}


def samples(folder: Path, iteration: int, quality: float, prompts: Sequence[str], columns: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    grid = Image.new("L", (32 * columns, 32 * math.ceil(len(prompts) / columns)))
    for place in range(len(prompts)):
        tile = picture(place, quality, seed=place)
        grid.paste(tile, (32 * (place % columns), 32 * (place // columns)))
    grid.save(folder / f"iteration_{iteration:06d}.png")
    facts = {"iteration": iteration, "prompts": list(prompts), "columns": columns}
    (folder / f"iteration_{iteration:06d}.json").write_text(json.dumps(facts))


def video_samples(folder: Path, iteration: int, quality: float, prompts: Sequence[str], columns: int = 3) -> None:
    """Clips of 32 by 32 pixels, playing in a grid, and eight frames of each in a row."""
    folder.mkdir(exist_ok=True)
    clips = [fake_videos.clip(picture(place, quality, seed=place), place / 8) for place in range(len(prompts))]
    stem = folder / f"iteration_{iteration:06d}"
    playing = [fake_videos.side_by_side(frames, columns) for frames in zip(*clips, strict=True)]
    fake_videos.write_mp4(
        stem.with_suffix(".mp4"), [frame.resize([2 * side for side in frame.size]) for frame in playing]
    )
    strips = [frames[place] for frames in clips for place in fake_videos.STRIP]
    fake_videos.side_by_side(strips, len(fake_videos.STRIP)).save(stem.with_suffix(".png"))
    facts = {"iteration": iteration, "prompts": list(prompts), "columns": columns, "kind": "video"}
    moving = {"fps": fake_videos.FPS, "frames": fake_videos.FRAMES, "strip": fake_videos.STRIP}
    stem.with_suffix(".json").write_text(json.dumps(facts | moving))


def picture(figure: int, quality: float, seed: int) -> Image.Image:
    """A polygon that emerges from noise."""
    rng = random.Random(seed)
    image = Image.new("L", (32, 32))
    corners = [
        (16 + 11 * math.sin(a * math.tau / (figure + 3)), 16 - 11 * math.cos(a * math.tau / (figure + 3)))
        for a in range(figure + 3)
    ]
    ImageDraw.Draw(image).polygon(corners, outline=255, width=3)
    noise = Image.frombytes("L", (32, 32), rng.randbytes(32 * 32))
    return Image.blend(noise, image, min(0.35 + 0.65 * quality, 1.0))


def tree(
    folder: Path,
    iteration: int,
    quality: float,
    prompt: str,
    steps: int = STEPS,
    splits: Sequence[int] = SPLITS,
    labels: Sequence[str] = ("digits",),
    video: bool = False,
) -> None:
    """A recorded tree, its values fused by plain means; the last leaf's reward failed."""
    rng = random.Random(iteration)
    parent, depths = grown(steps, splits)
    level = [node for node, depth in enumerate(depths) if depth == steps]
    values: list[float | None] = [None] * len(parent)
    for place, leaf in enumerate(level[:-1]):
        values[leaf] = round(-1.5 + quality + 0.4 * math.sin(place * 1.7) + rng.gauss(0, 0.15), 4)
    fuse(parent, values)
    advantages = spread_out(values, depths)
    nodes = [
        {
            "id": node,
            "depth": depths[node],
            "parent": parent[node],
            "value": values[node],
            "advantage": advantages[node],
            "trained": node > 0 and depths[node] <= splits[-1] + 4 and advantages[node] is not None,
            "stochastic": node > 0 and depths[node] - 1 <= splits[-1] + 3,
        }
        for node in range(len(parent))
    ]
    leaves: list[dict[str, Any]] = []
    (folder / f"iteration_{iteration:06d}").mkdir(parents=True, exist_ok=True)
    for place, leaf in enumerate(level):
        name = f"iteration_{iteration:06d}/leaf_{place:02d}.{'webp' if video else 'png'}"
        still = picture(iteration // 20, min(quality + 0.1 * rng.random(), 1), seed=place)
        if video:
            fake_videos.write_webp(folder / name, fake_videos.clip(still, place / len(level)))
        else:
            still.save(folder / name)
        rewards, valid = dict.fromkeys(labels, values[leaf]), values[leaf] is not None
        leaves.append({"node": leaf, "rewards": rewards, "valid": valid, "thumbnail": name})
    record = {"iteration": iteration, "prompt": prompt, "steps": steps, "splits": list(splits)}
    (folder / f"iteration_{iteration:06d}.json").write_text(json.dumps(record | {"nodes": nodes, "leaves": leaves}))


def grown(steps: int, splits: Sequence[int]) -> tuple[list[int | None], list[int]]:
    """Each node's parent and depth, numbered depth by depth, with two children at a split."""
    parent: list[int | None] = [None]
    depths, level = [0], [0]
    for step in range(steps):
        above = [node for node in level for _ in range(2 if step in splits else 1)]
        level = list(range(len(parent), len(parent) + len(above)))
        parent += above
        depths += [step + 1] * len(above)
    return parent, depths


def fuse(parent: Sequence[int | None], values: list[float | None]) -> None:
    """Give every node above the leaves the mean of its children's values."""
    below: dict[int, list[float]] = {}
    for node in reversed(range(len(parent))):
        if node in below:
            values[node] = round(sum(below[node]) / len(below[node]), 6)
        above, value = parent[node], values[node]
        if above is not None and value is not None:
            below.setdefault(above, []).append(value)


def spread_out(values: Sequence[float | None], depths: Sequence[int]) -> list[float | None]:
    """Per depth, values with zero mean and unit deviation."""
    advantages: list[float | None] = [None] * len(values)
    for depth in set(depths):
        known = [(node, value) for node, value in enumerate(values) if depths[node] == depth and value is not None]
        centre = sum(value for _, value in known) / len(known)
        deviation = math.sqrt(sum((value - centre) ** 2 for _, value in known) / max(len(known) - 1, 1))
        for node, value in known:
            advantages[node] = (value - centre) / deviation if deviation else 0.0
    return advantages
