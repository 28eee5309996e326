"""A canvas for flat illustrations: outlines become masks, masks are filled with gradients, blurred for shadow and glow.

Lengths are pixels of the finished picture, WIDTH x HEIGHT, measured from its top left. The canvas itself is SCALE times
as large, and is reduced at the end so that edges come out smooth. An outline is an array (N, 2) of x and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

WIDTH, HEIGHT, SCALE = 640, 400, 3
FULL = (WIDTH * SCALE, HEIGHT * SCALE)
WHITE = "#ffffff"
Outline = NDArray[np.float64]
Point = tuple[float, float]


def points(*corners: Point) -> Outline:
    """A polygon."""
    return np.array(corners, dtype=np.float64)


def box(x: float, y: float, width: float, height: float) -> Outline:
    """A rectangle from its top left."""
    return points((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def oval(x: float, y: float, rx: float, ry: float | None = None) -> Outline:
    """An ellipse around (x, y); a circle without ``ry``."""
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + (rx if ry is None else ry) * np.sin(turn)], axis=1)


def smooth(*corners: Point, closed: bool = True) -> Outline:
    """A Catmull-Rom curve through points."""
    knots = points(*corners)
    knots = np.concatenate([knots[-1:], knots, knots[:2]] if closed else [knots[:1], knots, knots[-1:]])
    a, b, c, d = (knots[i : len(knots) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, 16, endpoint=False)[:, None]
    curve = b + (t * (c - a) + t**2 * (2 * a - 5 * b + 4 * c - d) + t**3 * (3 * (b - c) + d - a)) / 2
    flat: Outline = curve.reshape(-1, 2)
    return flat if closed else np.concatenate([flat, points(corners[-1])])


def place(outline: Outline, x: float, y: float, size: float = 1.0, angle: float = 0.0) -> Outline:
    """Scale an outline, turn it clockwise by ``angle`` degrees and move its origin to (x, y); size < 0 mirrors it."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    scaled = outline * np.array([size, abs(size)])
    moved: Outline = scaled @ np.array([[cos, sin], [-sin, cos]]) + np.array([x, y])
    return moved


def area(*outlines: Outline) -> Image.Image:
    """The mask of what lies in any of the outlines."""
    mask = Image.new("L", FULL)
    draw = ImageDraw.Draw(mask)
    for outline in outlines:
        draw.polygon([float(value) for value in (outline * SCALE).ravel()], fill=255)
    return mask


def line(width: float, *outlines: Outline) -> Image.Image:
    """The mask of lines through the points of each outline, with round ends."""
    mask = Image.new("L", FULL)
    draw = ImageDraw.Draw(mask)
    for outline in outlines:
        path = [(float(x), float(y)) for x, y in outline * SCALE]
        draw.line(path, fill=255, width=max(1, round(width * SCALE)), joint="curve")
        for x, y in (path[0], path[-1]):
            r = width * SCALE / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return mask


def soft(mask: Image.Image, radius: float) -> Image.Image:
    """A mask with its edge blurred."""
    return mask.filter(ImageFilter.GaussianBlur(radius * SCALE))


def both(one: Image.Image, other: Image.Image) -> Image.Image:
    """What lies in two masks."""
    return ImageChops.multiply(one, other)


def without(one: Image.Image, other: Image.Image) -> Image.Image:
    """What lies in the first mask alone."""
    return ImageChops.subtract(one, other)


def mix(one: str, other: str, share: float) -> str:
    """A colour between two; ``share`` is that of the other."""
    pair = zip(ImageColor.getrgb(one)[:3], ImageColor.getrgb(other)[:3], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pair)


@dataclass(frozen=True)
class Canvas:
    """The picture being drawn, and where its random choices come from."""

    image: Image.Image
    source: np.random.Generator

    @classmethod
    def blank(cls, seed: tuple[int, ...]) -> Canvas:
        """An empty canvas."""
        return cls(Image.new("RGB", FULL), np.random.default_rng(seed))

    def fill(self, mask: Image.Image, top: str, bottom: str | None = None, opacity: float = 1.0) -> None:
        """Fill a mask with a colour, or with a gradient from its top to its bottom."""
        extent = mask.getbbox()
        if extent is None:
            return
        part = mask.crop(extent)
        if opacity < 1:
            part = part.point([round(value * opacity) for value in range(256)])
        ends = [np.array(ImageColor.getrgb(colour)[:3], dtype=np.float64) for colour in (top, bottom or top)]
        column = np.linspace(ends[0], ends[1], part.height).round().astype(np.uint8)
        self.image.paste(Image.fromarray(column[:, None]).resize(part.size, Image.Resampling.NEAREST), extent, part)

    def shape(self, outline: Outline, top: str, bottom: str | None = None, opacity: float = 1.0) -> None:
        """Fill one outline."""
        self.fill(area(outline), top, bottom, opacity)

    def stroke(self, width: float, outline: Outline, colour: str, opacity: float = 1.0) -> None:
        """Draw one line."""
        self.fill(line(width, outline), colour, opacity=opacity)

    def solid(self, outline: Outline, colour: str, light: Point = (-0.3, -0.35), depth: float = 0.45) -> None:
        """Fill an outline so that it looks round, lit from the side that ``light`` points to."""
        size = np.ptp(outline, axis=0)
        centre = (outline.max(axis=0) + outline.min(axis=0)) / 2
        near = oval(*(centre + np.array(light) * size * 0.45), *(size * 0.36))
        mask = area(outline)
        self.fill(mask, mix(colour, "#000018", depth * 0.8), mix(colour, "#000018", depth))
        self.fill(both(mask, soft(area(near), float(size.min()) * 0.16)), mix(colour, WHITE, 0.12))
        gleam = oval(*(centre + np.array(light) * size * 0.75), *(size * 0.09))
        self.fill(both(mask, soft(area(gleam), float(size.min()) * 0.04)), WHITE, opacity=0.55)

    def texture(self, mask: Image.Image, strength: float, across: float, down: float) -> None:
        """Lighten and darken a mask by smooth noise whose grains are ``across`` x ``down`` pixels large."""
        extent = mask.getbbox()
        if extent is None:
            return
        part = mask.crop(extent)
        grid = (max(2, round(part.height / SCALE / down)), max(2, round(part.width / SCALE / across)))
        grains = Image.fromarray(self.source.uniform(-255, 255, grid).astype(np.float32))
        noise = np.asarray(grains.resize(part.size, Image.Resampling.BICUBIC)) * strength
        for colour, values in ((WHITE, noise), ("#000010", -noise)):
            shade = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            self.image.paste(colour, extent, both(part, shade))

    def finished(self) -> Image.Image:
        """The picture at its own size."""
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, reducing_gap=None)


@dataclass(frozen=True)
class Scene:
    """A prompt, and what draws the picture that its video starts from."""

    prompt: str
    draw: Callable[[Canvas], None]

    def picture(self, *seed: int) -> Image.Image:
        """The finished picture; its random choices depend on the seed alone."""
        canvas = Canvas.blank(seed)
        self.draw(canvas)
        return canvas.finished()
