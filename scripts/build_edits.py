"""Draw the pictures that the image-editing recipes try themselves on, and write an instruction for each.

Flat shapes on plain ground: enough to see that a recipe runs, not to train on. The result depends on the seeds below
only.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SEEDS = {"train": 21, "heldout": 22}
COUNTS = {"train": 12, "heldout": 6}
SIZES = ((128, 128), (160, 96), (96, 160))
"""Widths and heights, in turn."""
COLOURS = {
    "red": "#c83228",
    "orange": "#e68a1e",
    "yellow": "#ebd228",
    "green": "#3c9646",
    "blue": "#2d5ac8",
    "purple": "#783ca0",
    "black": "#1e1e1e",
}
GROUNDS = {"white": "#f5f5f5", "grey": "#a0a0a0", "pale blue": "#c8dcf0", "pale green": "#d2ebc8"}
SHAPES = {"square": 4, "circle": 0, "triangle": 3, "hexagon": 6}
"""Corners of each shape; 0: it is round."""


@dataclass(frozen=True)
class Drawing:
    """A shape on a ground, and what else it might be."""

    shape: str
    colour: str
    ground: str
    other_shape: str
    other_colour: str
    other_ground: str

    def instruction(self, kind: int) -> str:
        """Return one of several instructions."""
        return (
            f"Make the {self.shape} {self.other_colour}.",
            f"Change the background to {self.other_ground}.",
            f"Turn the {self.colour} {self.shape} into a {self.other_shape}.",
            f"Remove the {self.shape}.",
            f"Put a small {self.other_colour} {self.other_shape} inside the {self.shape}.",
            f"Make the {self.colour} {self.shape} half as large.",
        )[kind]

    def picture(self, size: tuple[int, int], source: random.Random) -> Image.Image:
        """Draw the shape at a chance point of a picture of this width and height."""
        width, height = size
        radius = 0.3 * min(size)
        centre = [radius * 1.1 + source.random() * (side - 2.2 * radius) for side in size]
        image = Image.new("RGB", (4 * width, 4 * height), GROUNDS[self.ground])  # shrunk, so that edges are smooth
        draw, circle = ImageDraw.Draw(image), (4 * centre[0], 4 * centre[1], 4 * radius)
        if SHAPES[self.shape]:
            draw.regular_polygon(circle, SHAPES[self.shape], fill=COLOURS[self.colour])
        else:
            draw.circle(circle[:2], circle[2], fill=COLOURS[self.colour])
        return image.resize(size, Image.Resampling.LANCZOS)


def draw_one(source: random.Random) -> Drawing:
    """Choose shapes, colours and grounds by chance."""
    shape, other_shape = source.sample(list(SHAPES), 2)
    colour, other_colour = source.sample(list(COLOURS), 2)
    ground, other_ground = source.sample(list(GROUNDS), 2)
    return Drawing(shape, colour, ground, other_shape, other_colour, other_ground)


def write_set(folder: Path, name: str) -> None:
    """Write `edits_NAME.jsonl`, and its pictures under `edits`."""
    (folder / "edits").mkdir(parents=True, exist_ok=True)
    source, lines = random.Random(SEEDS[name]), []
    for row in range(COUNTS[name]):
        drawing, file = draw_one(source), f"edits/{name}_{row:03d}.png"
        picture = drawing.picture(SIZES[row % len(SIZES)], source)
        picture.quantize(32).save(folder / file, optimize=True)
        lines.append(json.dumps({"prompt": drawing.instruction(row % 6), "image": file}) + "\n")
    (folder / f"edits_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/prompts", help="folder for prompts and pictures")
    output: Path = parser.parse_args().output
    for name in SEEDS:
        write_set(output, name)


if __name__ == "__main__":
    main()
