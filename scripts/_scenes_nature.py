"""Training scenes of nature and weather."""

from __future__ import annotations

import _scene_parts as part
from _scene_canvas import (
    HEIGHT,
    WHITE,
    WIDTH,
    Canvas,
    Scene,
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
)


def _meadow(c: Canvas) -> None:
    part.sky(c, part.DAY, 250)
    for x, y, size in ((150, 110, 230), (450, 90, 260), (330, 180, 130), (600, 190, 120)):
        part.cloud(c, x, y, size)
    part.hills(c, 262, 46, "#a7cfa0", "#86b97c", 1.5)
    part.plain(c, 256, "#8cc25c", "#4f8f3b")
    part.tree(c, 452, 304, 150)
    part.grass(c, 290, 260, "#3f7d33")
    part.flowers(c, 276, 240, ("#f5e15a", "#f08aa8", WHITE))


def _lighthouse(c: Canvas) -> None:
    part.sky(c, part.DUSK, 270)
    part.sun(c, 130, 236, 26, "#ffe0a0")
    part.cloud(c, 220, 110, 190, "#f7c9b0", "#b58fb0")
    part.water(c, 262, "#c58f9a", "#2c3f70", 60)
    part.glitter(c, 130, 262, "#ffe3b8")
    c.fill(soft(area(points((468, 92), (0, 20), (0, 120))), 8), "#fff3c0", opacity=0.35)
    c.shape(smooth((330, 400), (380, 330), (440, 300), (520, 296), (600, 320), (700, 400)), "#5a4c5c", "#332c3c")
    tower = points((446, 306), (456, 112), (488, 112), (498, 306))
    c.shape(tower, "#f2ece4")
    for y in (128, 196, 264):
        c.fill(both(area(tower), area(box(430, y, 80, 34))), "#c8392f")
    c.fill(both(area(tower), soft(area(box(480, 100, 40, 220)), 6)), "#201030", opacity=0.35)
    c.shape(box(446, 106, 52, 8), "#33303c")
    c.shape(box(458, 78, 28, 28), "#fff1b0")
    c.shape(points((452, 80), (472, 58), (492, 80)), "#a82c26")
    part.rocks(c, [(330, 396, 40), (400, 404, 52), (580, 402, 60)], "#453c4c")
    for x, y, size in ((60, 372, 90), (238, 384, 80), (330, 398, 96), (470, 402, 90), (600, 404, 80)):
        crest = [(x - size, y + 10), (x - size * 0.5, y - 6), (x + size * 0.2, y - 12), (x + size, y + 8)]
        c.fill(soft(area(smooth(*crest, (x + size * 0.2, y))), 1.2), WHITE, "#c8d4ea", 0.85)


def _candle(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, HEIGHT), "#2c2030", "#3d2a2c")
    c.texture(area(box(0, 0, WIDTH, 290)), 0.05, 90, 90)
    c.fill(soft(area(oval(320, 150, 190)), 60), "#e08a3c", opacity=0.38)
    c.shape(box(0, 286, WIDTH, 114), "#8a5630", "#4a2b18")
    c.texture(area(box(0, 286, WIDTH, 114)), 0.09, 150, 4)
    c.fill(soft(area(oval(320, 330, 200, 34)), 16), "#ffc878", opacity=0.4)
    part.shadow(c, 322, 345, 74, 12, 0.5)
    c.shape(oval(320, 338, 66, 14), "#d9a441", "#8d6220")
    c.shape(oval(320, 334, 50, 9), "#7c5319")
    wax = smooth((292, 196), (348, 196), (350, 270), (349, 334), (320, 341), (291, 334), (290, 270))
    c.shape(wax, "#fff3d6", "#c9a777")
    c.shape(oval(320, 196, 29, 7), "#ffe7b0")
    c.stroke(2.5, points((320, 196), (321, 180)), "#3a2a20")
    part.flame(c, 321, 186, 84)
    for x, y, tint in ((140, 322, "#8b2f3c"), (152, 300, "#36586b")):
        c.shape(box(x - 66, y, 132, 22), mix(tint, WHITE, 0.14), tint)
        c.shape(box(x - 62, y + 6, 128, 10), "#e8dcc0", "#bba988")
    part.vignette(c, 0.6)


def _park(c: Canvas) -> None:
    part.sky(c, ("#bcd7e4", "#fbeed2"), 240)
    part.hills(c, 250, 70, "#e2b774", "#cf9a58", 1.8)
    part.plain(c, 244, "#d8b45a", "#a8863c")
    part.ground(c, points((0, 400), (300, 250), (336, 250), (520, 400)), "#eadab8", "#cdb690", 0.03)
    part.plain(c, 399, "#a8863c", "#a8863c")
    far = ((440, 262, 120, "#d98a2e"), (210, 262, 110, "#c9572e"))
    for x, y, size, tint in (*far, (540, 306, 250, "#e08a28"), (84, 320, 280, "#cc4f2a")):
        part.tree(c, x, y, size, tint)
    c.fill(area(box(432, 330, 8, 26), box(520, 330, 8, 26)), "#3a3431")
    c.fill(area(box(424, 322, 112, 8), box(424, 298, 112, 6), box(424, 308, 112, 6)), "#9c6238", "#7a4827")
    leaf = smooth((0, -9), (5, -2), (3, 6), (0, 10), (-3, 6), (-5, -2))
    for k in range(54):
        x, y, turn = c.source.uniform((0, 60, 0), (WIDTH, HEIGHT, 180))
        c.shape(place(leaf, x, y, 0.6 + y / 400, turn), ("#e0552a", "#f0a030", "#c83c28", "#f4c64a")[k % 4])


def _windmill(c: Canvas) -> None:
    part.sky(c, ("#69b0e0", "#fbeede"), 270)
    part.cloud(c, 150, 110, 170)
    part.cloud(c, 560, 80, 130)
    part.plain(c, 266, "#8fbf68", "#5e9a48")
    for k, tint in enumerate(("#d94f5c", "#f2c53d", "#e98a3a", "#b965b5", "#d94f5c")):
        y = 280 + 6 * k * (1 + 0.55 * k)
        c.shape(box(0, y, WIDTH, 5 + 2.6 * k), tint, mix(tint, "#305020", 0.35))
        heads = [oval(x, y + c.source.uniform(-1, 1), 2.4 + k, 2.8 + k) for x in range(0, WIDTH, 7 + 3 * k)]
        c.fill(area(*heads), mix(tint, WHITE, 0.15), tint)
    mill = points((330, 284), (348, 138), (404, 138), (422, 284))
    c.shape(mill, "#e9dfd0", "#cdbda6")
    c.fill(both(area(mill), soft(area(box(392, 130, 60, 160)), 8)), "#302020", opacity=0.35)
    c.shape(smooth((340, 140), (352, 106), (376, 92), (400, 106), (412, 140)), "#8a4b34", "#67341f")
    c.fill(area(box(366, 244, 22, 40), box(368, 176, 16, 20)), "#6b4630")
    for angle in (20, 110, 200, 290):
        c.shape(place(box(6, -4, 118, 4), 376, 124, 1, angle), "#5a3d28")
        c.shape(place(box(26, 0, 96, 24), 376, 124, 1, angle), "#fdf6e6", opacity=0.92)
        grid = [place(points((26 + 16 * k, 0), (26 + 16 * k, 24)), 376, 124, 1, angle) for k in range(7)]
        c.fill(line(1.2, *grid, place(points((26, 12), (122, 12)), 376, 124, 1, angle)), "#a07a55")
    c.shape(oval(376, 124, 8), "#3c2a1c")


def _fish(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, HEIGHT), "#5cc3d6", "#0f4f7c")
    part.rays(c, (70, 210, 390, 560), 360)
    part.ground(c, smooth((0, 352), (160, 338), (360, 358), (640, 336), closed=False), "#c9b98c", "#8a8260")
    part.rocks(c, [(96, 372, 44), (560, 384, 58), (500, 390, 34)], "#4f6574")
    for x, height, tint in ((60, 190, "#2f8a5c"), (130, 130, "#3fa066"), (520, 210, "#2c8060"), (592, 160, "#46a56a")):
        for lean in (-14, 2, 16):
            bends = [(lean * 0.3, 0), (lean * 0.9 + 8, -0.4 * height), (lean - 6, -0.7 * height), (lean * 1.6, -height)]
            c.stroke(6, place(smooth(*bends, closed=False), x, 366), mix(tint, "#0f4f7c", 0.15 if lean < 0 else 0))
    _swimmer(c, 318, 204, 1.0, "#f08a2c", WHITE)
    for x, y in ((150, 130), (196, 112), (132, 170)):
        _swimmer(c, x, y, 0.2, "#9fd3e0", "#cfeef4")
    c.fill(area(oval(452, 150, 6), oval(464, 124, 8), oval(456, 94, 5)), "#e4f8fc", opacity=0.55)


def _swimmer(c: Canvas, x: float, y: float, size: float, colour: str, band: str) -> None:
    """A fish that faces right."""
    c.shape(place(smooth((-78, 0), (-134, -52), (-118, 0), (-134, 52)), x, y, size), mix(colour, "#a02000", 0.3))
    c.shape(place(smooth((-40, -44), (-6, -86), (52, -56), (40, -34)), x, y, size), mix(colour, "#a02000", 0.3))
    body = place(smooth((104, 4), (70, -40), (0, -58), (-56, -32), (-90, 0), (-56, 34), (0, 56), (70, 40)), x, y, size)
    c.solid(body, colour, (0.1, -0.5), 0.3)
    for dx, width in ((34, 22), (-38, 18)):
        left, right = (dx, dx + 8, dx), (dx + width, dx + width + 8, dx + width)
        corners = [*zip(left, (-70, 0, 70), strict=True), *zip(reversed(right), (70, 0, -70), strict=True)]
        c.fill(both(area(body), area(place(smooth(*corners), x, y, size))), band, mix(band, "#406080", 0.3), 0.9)
    c.shape(place(smooth((4, 10), (-30, 42), (-36, 12)), x, y, size), mix(colour, "#ffe060", 0.4))
    c.shape(oval(x + 76 * size, y - 12 * size, 10 * size), WHITE)
    c.shape(oval(x + 78 * size, y - 12 * size, 6 * size), "#14202c")


def _birds(c: Canvas) -> None:
    part.sky(c, ("#3d3f86", "#ffb765"), 330)
    part.sun(c, 420, 262, 44, "#ffd98a")
    for x, y, size in ((120, 150, 220), (520, 120, 240), (300, 220, 150)):
        part.cloud(c, x, y, size, "#f3a08a", "#a8658c")
    part.hills(c, 352, 80, "#6d4a7c", "#4f3868", 1.4)
    part.hills(c, 388, 60, "#3b2c56", "#241c3c", 2.4)
    left = ((180, 120, 36), (250, 92, 30), (262, 150, 32), (330, 72, 26))
    for x, y, size in (*left, (345, 170, 28), (404, 56, 22), (428, 182, 24)):
        part.bird(c, x, y, size, "#1f1a38")


def _waterfall(c: Canvas) -> None:
    part.sky(c, part.DAY, 200)
    part.hills(c, 190, 90, "#7fb188", "#4f8a60", 2)
    c.shape(smooth((-20, 150), (120, 96), (240, 112), (262, 250), (250, 420), (-20, 420)), "#6f6a68", "#3f3c42")
    c.shape(smooth((660, 130), (520, 92), (400, 110), (378, 250), (392, 420), (660, 420)), "#77716d", "#423f46")
    c.texture(area(box(0, 110, 256, 260), box(386, 110, 254, 260)), 0.12, 26, 50)
    fall = area(points((246, 108), (396, 108), (404, 340), (236, 340)))
    c.fill(fall, "#d4ecf6", "#9ccbe4")
    streaks = c.source.uniform((244, 100, 30), (396, 320, 110), (60, 3))
    lines = [points((x, y), (x + (x - 320) * 0.03, y + length)) for x, y, length in streaks]
    c.fill(both(fall, soft(line(2.6, *lines), 0.8)), WHITE, opacity=0.75)
    part.water(c, 330, "#7fbcd2", "#2f7593", 40)
    for x, y, r in ((236, 334, 30), (280, 342, 36), (330, 346, 38), (376, 340, 34), (410, 334, 26)):
        c.fill(soft(area(oval(x, y, r * 1.3, r * 0.7)), 7), WHITE, opacity=0.6)
    part.rocks(c, [(180, 372, 52), (470, 378, 58), (560, 396, 70), (80, 398, 76)], "#565158")
    left = ((60, 122, 90), (130, 106, 76), (196, 108, 64))
    for x, y, size in (*left, (446, 106, 70), (520, 100, 86), (596, 116, 100)):
        part.pine(c, x, y, size)


def _snowy_hut(c: Canvas) -> None:
    part.sky(c, part.NIGHT, 280)
    part.stars(c, 60, 180)
    part.sun(c, 540, 70, 22, "#eef0ff")
    part.mountain(c, 180, 300, 190, "#52689c", 0.5)
    part.mountain(c, 470, 300, 160, "#5a70a2", 0.5)
    part.hills(c, 312, 50, "#c4d2ea", "#9fb3d6", 1.3)
    for x, y, size in ((70, 322, 130), (130, 334, 100), (520, 330, 140), (590, 344, 120)):
        part.pine(c, x, y, size, "#2c5a5c", snow=True)
    part.ground(c, smooth((0, 330), (220, 318), (420, 336), (640, 322), closed=False), "#e8eff9", "#b2c3e0", 0.03)
    part.smoke(c, [(368, 132, 9), (378, 110, 13), (394, 84, 17), (416, 54, 20)], "#b8c2da", 0.6)
    c.fill(area(box(358, 142, 20, 40)), "#8a6a5e", "#5c453e")
    c.fill(area(box(355, 138, 26, 8)), "#f2f6fc")
    part.house(c, 316, 344, 190, "#8a5a3a", "#e9f1fb", "#ffd978")
    c.fill(soft(area(oval(275, 300, 40), oval(362, 300, 40)), 16), "#ffcf70", opacity=0.35)
    flakes = c.source.uniform((0, 0, 1), (WIDTH, HEIGHT, 3), (110, 3))
    c.fill(area(*(oval(x, y, r) for x, y, r in flakes)), WHITE, opacity=0.85)


def _campfire(c: Canvas) -> None:
    part.sky(c, ("#0a1230", "#2c4070"), 300)
    part.stars(c, 130, 230)
    part.hills(c, 300, 60, "#1e3050", "#14243c", 1.5)
    for k in range(12):
        part.pine(c, 15 + 56 * k, 316, 90 + 50 * ((k * 5) % 3), "#16303a")
    part.plain(c, 310, "#2f3f34", "#16201c")
    c.fill(soft(area(oval(320, 350, 230, 44)), 26), "#ff9a40", opacity=0.4)
    c.shape(points((470, 332), (536, 210), (606, 332)), "#c2763c", "#8a4a26")
    c.shape(points((520, 332), (536, 226), (554, 332)), "#3c2016")
    part.flame(c, 286, 350, 90)
    part.flame(c, 352, 350, 96)
    part.flame(c, 320, 358, 140)
    for angle in (14, -14):
        c.shape(place(box(-66, -9, 132, 18), 320, 354, 1, angle), "#8a5a34", "#4f2f1a")
    part.rocks(c, [(244, 376, 20), (284, 384, 22), (330, 388, 22), (374, 382, 20), (404, 372, 18)], "#5c4c48")
    sparks = c.source.uniform((260, 90, 0.8), (384, 260, 2), (26, 3))
    c.fill(area(*(oval(x, y, r) for x, y, r in sparks)), "#ffc860")


def _sunflowers(c: Canvas) -> None:
    part.sky(c, ("#4a9fe0", "#e6f4ee"), 260)
    part.cloud(c, 180, 90, 170)
    part.cloud(c, 520, 130, 150)
    part.hills(c, 262, 40, "#9fc48f", "#7fae70", 1.4)
    part.plain(c, 254, "#7fa83c", "#4a7a2c")
    for y, r, gap in ((262, 6, 17), (276, 9, 25), (294, 13, 36)):
        heads = [(x + c.source.uniform(-4, 4), y + c.source.uniform(-3, 3)) for x in range(0, WIDTH + gap, gap)]
        c.fill(area(*(oval(a, b, r) for a, b in heads)), "#f3c02c", "#e0a01c")
        c.fill(area(*(oval(a, b, r * 0.45) for a, b in heads)), "#6b4220")
    part.grass(c, 320, 130, "#3a6a22", 18)
    petal = smooth((0, -1.0), (0.16, -0.72), (0.12, -0.4), (-0.12, -0.4), (-0.16, -0.72))
    for x, y, r in ((112, 236, 58), (540, 250, 54), (322, 190, 80)):
        c.stroke(r * 0.13, smooth((x, y), (x + 6, y + 90), (x - 4, 420), closed=False), "#4f8a34")
        for side in (-1, 1):
            leaf = smooth((0, 0), (0.5, -0.42), (1.15, -0.3), (0.6, 0.06))
            c.shape(place(leaf, x, y + r * 1.9, side * r), "#6aa83e", "#3f7a2c")
        for k in range(32):
            tint = ("#f0ae1c", "#fbd23c")[k // 16]
            c.shape(place(petal, x, y, r * (1.0 - 0.1 * (k // 16)), 22.5 * k + 11 * (k // 16)), tint)
        c.solid(oval(x, y, r * 0.48), "#7a4a22", depth=0.3)


def _moon_sea(c: Canvas) -> None:
    part.sky(c, ("#0a1234", "#5a6aa8"), 240)
    part.stars(c, 90, 190)
    part.sun(c, 330, 120, 46, "#f5f1dc")
    for x, y, r in ((314, 108, 10), (346, 128, 13), (322, 142, 7)):
        c.shape(oval(x, y, r), "#d8d2b8", opacity=0.6)
    for x, y, size in ((120, 190, 200), (540, 170, 180)):
        part.cloud(c, x, y, size, "#8a96c8", "#4a5790")
    part.water(c, 236, "#46589a", "#0b1740", 90)
    part.glitter(c, 330, 238, "#f3efd6")
    c.shape(smooth((-30, 250), (-30, 150), (60, 168), (110, 214), (176, 242), (90, 250)), "#18244e", "#0c1534")
    c.shape(smooth((670, 254), (670, 172), (590, 184), (540, 224), (480, 244), (560, 254)), "#18244e", "#0c1534")


NATURE: tuple[Scene, ...] = (
    Scene("White clouds drift slowly to the left over a flower meadow with a single tree.", _meadow),
    Scene("Waves break on the rocks below a lighthouse at dusk while its beam sweeps round.", _lighthouse),
    Scene("The flame of a candle flickers gently on a table in a dark room.", _candle),
    Scene("Orange leaves fall slowly down from the trees of an autumn park.", _park),
    Scene("The sails of a windmill turn steadily behind rows of tulips.", _windmill),
    Scene("An orange fish swims slowly to the right between water plants.", _fish),
    Scene("A flock of birds flies to the left across a sunset sky.", _birds),
    Scene("Water pours down a high waterfall into a pool between dark rocks.", _waterfall),
    Scene("Snow falls softly on a wooden hut at night, and smoke rises from its chimney.", _snowy_hut),
    Scene("The flames of a campfire flicker and sparks fly under a starry sky.", _campfire),
    Scene("The camera pans slowly to the left while sunflowers sway in a light wind.", _sunflowers),
    Scene("The camera moves gently forward over the night sea towards the full moon.", _moon_sea),
)
