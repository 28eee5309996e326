"""Writes the scenes of each task, to train on and held out, into the package."""

import json
from pathlib import Path

import numpy as np
from branchtree_actions.samples import TASKS

FOLDER = Path(__file__).parents[1] / "branchtree_actions" / "scenes"
COUNTS = {"train": 512, "heldout": 128}


def scene_lines(task_name: str, split: str) -> list[str]:
    """Return the lines of a prompt file. Splits have seeds of their own, so no scene is in two of them."""
    task = TASKS[task_name]
    rng = np.random.default_rng([*task_name.encode(), *split.encode()])
    scenes = [task.draw_scene(rng) for _ in range(COUNTS[split])]
    return [json.dumps({"prompt": task.prompt, **scene.model_dump()}) for scene in scenes]


def main() -> None:
    """Write TASK_train.jsonl and TASK_heldout.jsonl for each task."""
    for task_name in TASKS:
        for split in COUNTS:
            text = "".join(f"{line}\n" for line in scene_lines(task_name, split))
            (FOLDER / f"{task_name}_{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
