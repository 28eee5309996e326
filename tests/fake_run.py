"""Builds a run directory as training writes it, out of made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
) -> Path:
    """A finished run, or, where more iterations are planned than were done, one that stopped on the way."""
    planned = iterations if planned is None else planned
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(planned, prompts), sort_keys=False))
    write_lines(folder / "metrics.jsonl", [metrics(i, iterations, rng, len(splits)) for i in range(iterations)])
    write_lines(folder / "timing.jsonl", [timing(i, rng) for i in range(iterations)])
    done = [i for i in range(0, planned + 1, every) if i <= iterations]
    write_lines(folder / "evaluation.jsonl", [evaluation(i, planned) for i in done])
    for i in done:
        samples(folder / "samples", i, i / planned, prompts)
    for i in [i for i in done if i < iterations]:
        tree(folder / "trees", i, i / planned, prompts[i % len(prompts)], steps, splits)
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
        "data": {"prompts": list(prompts)},
        "run": {"iterations": planned, "precision": "fp32"},
    }


def metrics(iteration: int, total: int, rng: random.Random, splits: int) -> dict[str, Any]:
    part = iteration / max(total, 1)
    level = -1.9 + 1.5 * (1 - math.exp(-3 * part))
    shares = [0.31, 0.29, 0.22, 0.18, 0.1, 0.1][:splits]
    row: dict[str, Any] = {
        "iteration": iteration,
        "reward/digits/mean": level + rng.gauss(0, 0.12),
        "reward/digits/std": 0.6 - 0.3 * part + abs(rng.gauss(0, 0.05)),
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
        "rows/total": (iteration + 1) * (ROLLOUT_ROWS + 3 * GRADIENT_ROWS),
        "edges/trained": 226,
        "leaves/scored": 32,
    }
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
    folder: Path, iteration: int, quality: float, prompt: str, steps: int = STEPS, splits: Sequence[int] = SPLITS
) -> dict[str, Any]:
    """A recorded tree, its values fused by plain means; the last leaf's reward failed."""
    rng = random.Random(iteration)
    parents, depths, level = [None], [0], [0]
    parent: list[int | None] = list(parents)
    for step in range(steps):
        following = []
        for node in level:
            for _ in range(2 if step in splits else 1):
                following.append(len(parent))
                parent.append(node)
                depths.append(step + 1)
        level = following
    values: list[float | None] = [None] * len(parent)
    for place, leaf in enumerate(level[:-1]):
        values[leaf] = round(-1.5 + quality + 0.4 * math.sin(place * 1.7) + rng.gauss(0, 0.15), 4)
    children: dict[int, list[float]] = {}
    for node in range(len(parent) - 1, -1, -1):
        below = children.get(node)
        if below:
            values[node] = round(sum(below) / len(below), 6)
        above, value = parent[node], values[node]
        if above is not None and value is not None:
            children.setdefault(above, []).append(value)
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
    leaves = []
    thumbnails = folder / f"iteration_{iteration:06d}"
    thumbnails.mkdir(parents=True, exist_ok=True)
    for place, leaf in enumerate(level):
        name = f"{thumbnails.name}/leaf_{place:02d}.png"
        picture(iteration // 20, min(quality + 0.1 * rng.random(), 1), seed=place).save(folder / name)
        valid = values[leaf] is not None
        leaves.append({"node": leaf, "rewards": {"digits": values[leaf]}, "valid": valid, "thumbnail": name})
    record = {
        "iteration": iteration,
        "prompt": prompt,
        "steps": steps,
        "splits": list(splits),
        "nodes": nodes,
        "leaves": leaves,
    }
    (folder / f"iteration_{iteration:06d}.json").write_text(json.dumps(record))
    return record


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
