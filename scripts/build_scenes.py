"""Draw the first frames that the full-size image-to-video recipes start with, and write their prompts.

They let a recipe run from an installed package, and show the form of the data; for a model to be used, replace them by
photographs. The result depends on the seeds below only.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from _scene_canvas import Scene
from _scenes_heldout import HELD_OUT
from _scenes_nature import NATURE
from _scenes_things import THINGS

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (*THINGS, *NATURE)
SEEDS = {"train": 11, "heldout": 12}
QUALITY = 86


def write_set(folder: Path, name: str, scenes: Sequence[Scene]) -> None:
    """Write `scenes_NAME.jsonl`, and the picture of each scene under `scenes`."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    lines = []
    for place, scene in enumerate(scenes):
        file = f"scenes/{name}_{place:03d}.jpg"
        scene.picture(SEEDS[name], place).save(folder / file, quality=QUALITY, optimize=True)
        lines.append(json.dumps({"prompt": scene.prompt, "image": file}) + "\n")
    (folder / f"scenes_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/prompts", help="folder for prompts and pictures")
    output: Path = parser.parse_args().output
    write_set(output, "train", TRAIN)
    write_set(output, "heldout", HELD_OUT)


if __name__ == "__main__":
    main()
