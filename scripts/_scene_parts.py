"""What scenes are made of: sky, hills, water, trees, clouds, buildings, wheels. Lengths as in `_scene_canvas`."""

from __future__ import annotations

import math

import numpy as np
from _scene_canvas import (
    HEIGHT,
    WHITE,
    WIDTH,
    Canvas,
    Outline,
    Point,
    area,
    both,
    box,
    line,
    mix,
    oval,
    place,
    points,
    smooth,
    soft,
    without,
)

NIGHT, DAY, DUSK = ("#0b1538", "#33508c"), ("#4f9fdc", "#d9f0f8"), ("#4a4f93", "#ffb27a")
LEAF = "#4f9152"


def sky(c: Canvas, colours: tuple[str, str], horizon: float = HEIGHT) -> None:
    """Fill the picture with a gradient that ends at the horizon."""
    c.shape(box(0, 0, WIDTH, HEIGHT), colours[1])
    c.shape(box(0, 0, WIDTH, horizon), *colours)


def sun(c: Canvas, x: float, y: float, r: float, colour: str = "#fff3c4") -> None:
    """A sun or moon with its glow."""
    for reach, opacity in ((3.2, 0.25), (1.5, 0.45)):
        c.fill(soft(area(oval(x, y, r * reach)), r * reach * 0.45), colour, opacity=opacity)
    c.shape(oval(x, y, r), mix(colour, WHITE, 0.5), colour)


def stars(c: Canvas, count: int, lowest: float) -> None:
    """Stars of three sizes above a height."""
    spots = c.source.uniform((4, 4), (WIDTH - 4, lowest), (count, 2))
    c.fill(area(*(oval(x, y, 0.6 + 0.35 * (i % 3)) for i, (x, y) in enumerate(spots))), WHITE, opacity=0.85)


def cloud(c: Canvas, x: float, y: float, size: float, top: str = WHITE, bottom: str = "#cfe0ee") -> None:
    """A heap of puffs with a flat base; ``size`` is its width."""
    puffs = [(-0.33, -0.08, 0.13), (-0.14, -0.17, 0.18), (0.1, -0.2, 0.2), (0.3, -0.09, 0.14)]
    shapes = [oval(x + size * dx, y + size * dy, size * r) for dx, dy, r in puffs]
    mask = both(area(*shapes, oval(x, y - 0.05 * size, size * 0.5, size * 0.08)), area(box(0, 0, WIDTH, y)))
    c.fill(soft(mask, 1.0), top, bottom, 0.95)


def hills(c: Canvas, base: float, height: float, top: str, bottom: str, waves: float = 2.0) -> None:
    """A rolling line of hills, filled down to the picture's end."""
    x = np.linspace(0, WIDTH, 161)
    phase = c.source.uniform(0, 2 * math.pi, 3)
    swell = sum(np.sin(2 * math.pi * waves * k * x / WIDTH + phase[k - 1]) / k**1.4 for k in (1, 2, 3))
    ground(c, np.stack([x, base - height * (0.5 + 0.3 * swell)], axis=1), top, bottom)


def ground(c: Canvas, surface: Outline, top: str, bottom: str, strength: float = 0.05) -> None:
    """Land below a line that runs from left to right."""
    mask = area(np.concatenate([surface, points((WIDTH, HEIGHT), (0, HEIGHT))]))
    c.fill(mask, top, bottom)
    c.texture(mask, strength, 60, 9)


def plain(c: Canvas, y: float, top: str, bottom: str, strength: float = 0.05) -> None:
    """Flat land from a height down to the picture's end."""
    ground(c, points((0, y), (WIDTH, y)), top, bottom, strength)


def mountain(c: Canvas, x: float, base: float, height: float, colour: str, snow: float = 0.3) -> None:
    """A mountain with a lit and a shaded side, and snow on the upper share of it."""
    lee = [(0.24, -0.66), (0.42, -0.56), (0.95, 0.0)]
    outline = place(points((-0.9, 0), (-0.5, -0.52), (-0.36, -0.6), (0, -1), *lee), x, base, height)
    crease = [(0.05, 0.0), (0.14, -0.25), (-0.02, -0.5), (0.08, -0.72)]
    shade = area(place(points((0, -1), *lee, *crease), x, base, height))
    c.shape(outline, mix(colour, WHITE, 0.2), colour)
    edge = base - height * (1 - snow)
    zigzag = [(x + height * (0.12 * k - 0.6), edge + height * (0.09 if k % 2 else -0.04)) for k in range(11)]
    c.fill(both(area(outline), area(points(*zigzag, (x + height, 0), (x - height, 0)))), WHITE, "#e3ecf6")
    c.fill(shade, "#182848", opacity=0.28)


def water(c: Canvas, y: float, top: str, bottom: str, glints: int = 70) -> None:
    """Water from a height down to the picture's end, with lines of light that grow towards the front."""
    c.shape(box(0, y, WIDTH, HEIGHT - y), top, bottom)
    near = c.source.uniform(0.02, 1, glints) ** 1.4
    places = c.source.uniform(0, WIDTH, glints)
    shapes = [oval(x, y + n * (HEIGHT - y), 8 + 34 * n, 0.5 + 1.3 * n) for x, n in zip(places, near, strict=True)]
    c.fill(area(*shapes), mix(top, WHITE, 0.55), opacity=0.4)


def glitter(c: Canvas, x: float, y: float, colour: str) -> None:
    """The reflection of a low sun or moon on water that begins at y."""
    rows = np.arange(y + 2, HEIGHT, 7)
    widths = c.source.uniform(0.35, 1, len(rows)) * (10 + (rows - y) * 0.42)
    shifts = c.source.uniform(-6, 6, len(rows))
    spots = zip(rows, widths, shifts, strict=True)
    c.fill(area(*(oval(x + shift, row, width, 1.7) for row, width, shift in spots)), colour, opacity=0.7)


def shadow(c: Canvas, x: float, y: float, rx: float, ry: float, opacity: float = 0.4) -> None:
    """The soft shadow of something that stands at (x, y)."""
    c.fill(soft(area(oval(x, y, rx, ry)), ry * 0.6), "#101020", opacity=opacity)


def pine(c: Canvas, x: float, y: float, height: float, colour: str = "#2f6a4f", snow: bool = False) -> None:
    """A pine that stands at (x, y)."""
    c.shape(box(x - height * 0.03, y - height * 0.15, height * 0.06, height * 0.15), "#5b4030")
    for level, width in ((0.1, 0.25), (0.33, 0.2), (0.56, 0.14)):
        low, tip = y - height * level, y - height * (level + 0.44)
        half = height * width
        c.shape(points((x - half, low), (x, tip), (x + half, low)), mix(colour, WHITE, 0.22), colour)
        c.shape(points((x, tip), (x + half, low), (x + half * 0.1, low)), "#000020", opacity=0.16)
        if snow:
            cap = points((x - half * 0.55, low - half * 0.8), (x, tip), (x + half * 0.55, low - half * 0.8))
            c.shape(cap, WHITE, "#dfe9f5", 0.92)


def tree(c: Canvas, x: float, y: float, size: float, colour: str = LEAF) -> None:
    """A broad tree of a given height that stands at (x, y)."""
    shadow(c, x, y, size * 0.36, size * 0.04, 0.3)
    trunk = [(-0.05, 0), (-0.03, -0.4), (-0.16, -0.6), (0, -0.47), (0.16, -0.62), (0.03, -0.4), (0.06, 0)]
    c.shape(place(points(*trunk), x, y, size), "#7a5335", "#573a25")
    crown = [(-0.22, -0.55, 0.19), (0.22, -0.56, 0.18), (0, -0.72, 0.25), (-0.12, -0.78, 0.16), (0.15, -0.76, 0.17)]
    for dx, dy, shade in ((0.0, 0.0, 0.22), (-0.02, -0.03, 0.0), (-0.045, -0.06, -0.2)):
        tint = mix(colour, "#001020", shade) if shade >= 0 else mix(colour, "#fff6b0", -shade)
        reach = 1 - 1.1 * abs(shade - 0.22)
        c.fill(area(*(oval(x + size * (a + dx), y + size * (b + dy), size * r * reach) for a, b, r in crown)), tint)


def grass(c: Canvas, y: float, count: int, colour: str, height: float = 14) -> None:
    """Blades along the lower part of the picture, taller towards the front."""
    roots = c.source.uniform((0, 0), (WIDTH, 1), (count, 2))
    lean = c.source.uniform(-6, 6, count)
    blades = [
        points((x - 1.2, base), (x + bend, base - height * (0.4 + n)), (x + 1.2, base))
        for (x, n), bend, base in zip(roots, lean, y + roots[:, 1] * (HEIGHT - y), strict=True)
    ]
    c.fill(area(*blades), colour, opacity=0.75)


def flowers(c: Canvas, y: float, count: int, colours: tuple[str, ...]) -> None:
    """Blossoms on a meadow that begins at y, larger towards the front."""
    for colour in colours:
        spots = c.source.uniform((0, 0.05), (WIDTH, 1), (count // len(colours), 2))
        c.fill(area(*(oval(x, y + n * (HEIGHT - y), 1 + 3 * n, 0.8 + 2.2 * n) for x, n in spots)), colour)


def house(c: Canvas, x: float, y: float, width: float, wall: str, roof: str, lit: str = "#6f93ad") -> None:
    """A house whose ground line's middle is (x, y)."""
    w, h = width, width * 0.55
    c.shape(box(x - w / 2, y - h, w, h), wall, mix(wall, "#000020", 0.18))
    eaves, top = y - h, y - h * 1.75
    c.shape(points((x - w * 0.6, eaves), (x - w * 0.4, top), (x + w * 0.4, top), (x + w * 0.6, eaves)), roof)
    c.shape(box(x - w * 0.6, eaves, w * 1.2, w * 0.025), mix(roof, "#000020", 0.25))
    for dx in (-0.3, 0.16):
        c.shape(box(x + w * dx, y - h * 0.75, w * 0.16, h * 0.36), lit)
    c.shape(box(x - w * 0.07, y - h * 0.62, w * 0.14, h * 0.62), "#5a3a2c")


def wheel(c: Canvas, x: float, y: float, r: float, rim: str = "#26282e", hub: str = "#c9ced6", spokes: int = 0) -> None:
    """A wheel around (x, y)."""
    if not spokes:
        c.shape(oval(x, y, r), rim)
        c.shape(oval(x, y, r * 0.55), hub, mix(hub, "#000000", 0.35))
        c.shape(oval(x, y, r * 0.2), rim)
        return
    rods = [place(points((0, 0), (1, 0)), x, y, r, 360 * k / spokes) for k in range(spokes)]
    c.fill(line(r * 0.09, *rods), mix(rim, WHITE, 0.12))
    ring = without(area(oval(x, y, r * 1.08)), area(oval(x, y, r * 0.9)))
    c.fill(ring, mix(rim, WHITE, 0.2), mix(rim, "#000000", 0.3))
    c.shape(oval(x, y, r * 0.2), hub, rim)


def smoke(c: Canvas, puffs: list[tuple[float, float, float]], colour: str = "#f4f4f6", opacity: float = 0.75) -> None:
    """Puffs (x, y, radius), the first the densest."""
    for k, (x, y, r) in enumerate(puffs):
        c.fill(soft(area(oval(x, y, r)), r * 0.22), colour, mix(colour, "#606878", 0.35), opacity * 0.88**k)


def flame(c: Canvas, x: float, y: float, height: float) -> None:
    """A flame whose foot is (x, y), with its glow."""
    c.fill(soft(area(oval(x, y - height * 0.45, height * 0.9)), height * 0.5), "#ffb04a", opacity=0.5)
    drop = smooth((0, -1), (0.2, -0.52), (0.24, -0.2), (0, 0), (-0.24, -0.2), (-0.16, -0.5))
    for size, tint in ((1.0, "#f47b20"), (0.74, "#ffb52e"), (0.46, "#fff0a8")):
        c.fill(soft(area(place(drop, x, y - height * 0.02, height * size)), 0.8), tint)


def bird(c: Canvas, x: float, y: float, size: float, colour: str) -> None:
    """A bird with spread wings seen from afar."""
    body = smooth((-1, -0.3), (-0.45, -0.42), (0, 0), (0.5, -0.5), (1, -0.42), (0.5, -0.3), (0.05, 0.2), (-0.4, -0.24))
    c.shape(place(body, x, y, size), colour)


def balloon(c: Canvas, x: float, y: float, r: float, colours: tuple[str, str]) -> None:
    """A striped hot-air balloon whose envelope is centred on (x, y)."""
    half = [(0.72, -0.72), (1.0, -0.05), (0.7, 0.62), (0.2, 1.22)]
    hull = smooth((0, -1), *half, *((-dx, dy) for dx, dy in reversed(half)))
    ropes = [place(points((side * 0.18, 1.2), (side * 0.13, 1.55)), x, y, r) for side in (-1, 1)]
    c.fill(line(r * 0.025, *ropes), "#4a3a2c")
    c.shape(box(x - r * 0.16, y + r * 1.52, r * 0.32, r * 0.24), "#b07a45", "#7a4f2a")
    c.shape(place(hull, x, y, r), colours[0])
    for k, width in enumerate((0.8, 0.56, 0.3, 0.09)):
        c.shape(place(hull * np.array([width, 1]), x, y, r), colours[(k + 1) % 2])
    mask = area(place(hull, x, y, r))
    c.fill(both(mask, soft(area(oval(x - r * 0.35, y - r * 0.35, r * 0.4, r * 0.55)), r * 0.25)), WHITE, opacity=0.4)
    c.fill(both(mask, soft(area(oval(x + r * 0.85, y + r * 0.3, r * 0.5, r * 1.1)), r * 0.25)), "#10103a", opacity=0.4)


def towers(c: Canvas, base: float, colours: tuple[str, ...], tallest: float, pane: str = "#dcebf5") -> None:
    """A row of town houses along a ground line."""
    x, k = -10.0, 0
    while x < WIDTH:
        width, height = c.source.uniform(46, 84), tallest * c.source.uniform(0.5, 1)
        wall, top = colours[k % len(colours)], base - height
        c.shape(box(x, top, width, height), mix(wall, WHITE, 0.12), wall)
        columns, floors = int(width / 15 - 0.4), int(height / 20 - 0.5)
        panes = [box(x + 8 + 15 * i, top + 10 + 20 * j, 8, 11) for i in range(columns) for j in range(floors)]
        c.fill(area(*panes), pane, opacity=0.75)
        x, k = x + width, k + 1


def person(c: Canvas, x: float, y: float, size: float, shirt: str, trousers: str = "#3b4660") -> None:
    """A person of a given height who stands at (x, y) and holds an arm up to the right."""
    shadow(c, x, y, size * 0.3, size * 0.05)
    limbs = [points((dx, -0.42), (dx * 1.6, -0.02)) for dx in (-0.07, 0.07)]
    c.fill(line(size * 0.11, *(place(limb, x, y, size) for limb in limbs)), trousers)
    arms = [points((0.08, -0.72), (0.26, -0.98)), points((-0.1, -0.7), (-0.2, -0.46))]
    c.fill(line(size * 0.085, *(place(arm, x, y, size) for arm in arms)), mix(shirt, "#000020", 0.15))
    c.shape(place(smooth((-0.13, -0.78), (0.13, -0.78), (0.13, -0.4), (-0.13, -0.4)), x, y, size), shirt)
    c.shape(oval(x, y - size * 0.91, size * 0.1), "#e9b591")
    c.shape(place(smooth((-0.1, -0.93), (0, -1.03), (0.1, -0.95), (0.02, -0.95)), x, y, size), "#5a3a24")


def rays(c: Canvas, places: tuple[float, ...], lowest: float, opacity: float = 0.14) -> None:
    """Slanting rays of light that fall through water from above."""
    for x in places:
        beam = points((x, -5), (x + 46, -5), (x - 40, lowest), (x - 150, lowest))
        c.fill(soft(area(beam), 12), WHITE, opacity=opacity)


def road(c: Canvas, y: float, height: float, colour: str = "#656871") -> None:
    """A road seen from its side, with a broken line along its middle."""
    c.shape(box(0, y, WIDTH, height), mix(colour, WHITE, 0.05), mix(colour, "#000010", 0.15))
    c.fill(area(*(box(20 + 110 * k, y + height * 0.47, 56, 5) for k in range(6))), "#f3e7b0")


def vignette(c: Canvas, opacity: float = 0.35) -> None:
    """Darken the corners."""
    middle = soft(area(oval(WIDTH / 2, HEIGHT / 2, WIDTH * 0.55, HEIGHT * 0.6)), 70)
    c.fill(middle.point([255 - value for value in range(256)]), "#04040c", opacity=opacity)


def rocks(c: Canvas, spots: list[tuple[float, float, float]], colour: str = "#5d5a5e") -> None:
    """Rocks (x, y of the foot, size)."""
    form: list[Point] = [(-1, 0), (-0.85, -0.5), (-0.3, -0.85), (0.25, -0.7), (0.8, -0.42), (1, 0)]
    for x, y, size in spots:
        c.shape(place(points(*form), x, y, size), mix(colour, WHITE, 0.25), colour)
        c.shape(place(points(*form[2:], (0.1, 0)), x, y, size), "#000018", opacity=0.25)


def band(edge: Outline, height: float) -> Outline:
    """The outline of a strip that hangs from a line."""
    return np.concatenate([edge, edge[::-1] + points((0, height))])
