"""Write the first frames and prompts that the bundled small video model is trained and evaluated on.

Every digit, direction and speed makes one training prompt. Evaluation has each digit and direction once, in another
wording, and its frames show handwritten digits that the model was not trained on. The result depends on the seeds
below only.
"""

import argparse
import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from _digits import ROOT
from _moving_digits import DIRECTIONS, HELD_OUT_WORDINGS, SPEEDS, WORDINGS, Order, draw_motion, glyphs, path, render
from PIL import Image
from torch import Tensor

SEEDS = {"train": 5, "heldout": 6}


def first_frame(order: Order, images: Tensor, labels: Tensor, source: random.Random) -> Image.Image:
    """Draw the frame that a clip which obeys an order starts from."""
    row = source.choice((labels == order.digit).nonzero()[:, 0].tolist())
    centre = path([draw_motion(order, source)])[:, :1]
    frame = render(images[row : row + 1], centre)[0, 0, 0]
    return Image.fromarray((frame * 255).round().byte().numpy()).convert("RGB")


def write_set(folder: Path, name: str, orders: Sequence[Order], wordings: Sequence[str]) -> None:
    """Write `moving_digits_NAME.jsonl` and its frames, one for each order, the wordings in turn."""
    images, labels = glyphs(held_out=name == "heldout")
    source = random.Random(SEEDS[name])
    (folder / "moving_digits").mkdir(parents=True, exist_ok=True)
    lines = []
    for place, order in enumerate(orders):
        file = f"moving_digits/{name}_{place:03d}.png"
        first_frame(order, images, labels, source).save(folder / file, optimize=True)
        lines.append(json.dumps({"prompt": order.prompt(wordings[place % len(wordings)]), "image": file}) + "\n")
    (folder / f"moving_digits_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/prompts", help="folder for prompts and frames")
    output: Path = parser.parse_args().output
    orders = [Order(*combination) for combination in product(range(10), DIRECTIONS, SPEEDS)]
    write_set(output, "train", orders, WORDINGS)
    speeds = list(SPEEDS)
    combinations = enumerate(product(range(10), DIRECTIONS))
    held_out = [Order(digit, direction, speeds[place % 3]) for place, (digit, direction) in combinations]
    write_set(output, "heldout", held_out, HELD_OUT_WORDINGS)


if __name__ == "__main__":
    main()
