"""Writes the scenes of each task, to train on and held out, into the package.

Half of PushT's scenes are those in which a push by the demonstrating script ends, as in the midst of an episode.
"""

import json
from pathlib import Path

import numpy as np
from branchtree_actions.pusht import Table, environment, push
from branchtree_actions.samples import TASKS
from branchtree_actions.task import Array
from execute import observed

FOLDER = Path(__file__).parents[1] / "branchtree_actions" / "scenes"
COUNTS = {"train": 512, "heldout": 128}


def scene_lines(task_name: str, split: str) -> list[str]:
    """Return the lines of a prompt file. Splits have seeds of their own, so no scene is in two of them."""
    task = TASKS[task_name]
    rng = np.random.default_rng([*task_name.encode(), *split.encode()])
    scenes = [task.draw_scene(rng) for _ in range(COUNTS[split])]
    if task_name == "pusht":
        scenes[::2] = [pushed(scene, task.demonstrate(scene, rng)) for scene in scenes[::2]]
    return [json.dumps({"prompt": task.prompt, **scene.model_dump()}) for scene in scenes]


def pushed(scene: Table, actions: Array) -> Table:
    """Return the scene that a push leads to."""
    table = environment(scene)
    push(table, actions)
    after = observed(table)
    return Table(agent=[round(x, 1) for x in after.agent], block=[round(x, 3) for x in after.block])


def main() -> None:
    """Write TASK_train.jsonl and TASK_heldout.jsonl for each task."""
    for task_name in TASKS:
        for split in COUNTS:
            text = "".join(f"{line}\n" for line in scene_lines(task_name, split))
            (FOLDER / f"{task_name}_{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
