"""Training scenes of things that move: toys, vehicles, machines."""

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
    without,
)


def _ball(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, 250), "#e8dcc3", "#d8c7a6")
    c.shape(box(96, 34, 128, 142), WHITE)
    c.shape(box(103, 41, 114, 128), *part.DAY)
    part.cloud(c, 160, 120, 70)
    c.fill(area(box(157, 41, 6, 128), box(103, 100, 114, 6)), WHITE)
    c.shape(box(0, 238, WIDTH, 14), "#f4ecdc", "#bfae90")
    c.shape(box(0, 252, WIDTH, 148), "#b8834c", "#8a5a30")
    c.texture(area(box(0, 252, WIDTH, 148)), 0.1, 120, 4)
    seams = [points((320 + 58 * k, 252), (320 + 150 * k, 400)) for k in range(-6, 7)]
    c.fill(line(1.2, *seams), "#5c391c", opacity=0.6)
    c.fill(soft(area(points((160, 262), (262, 262), (330, 372), (150, 372))), 6), "#ffe9b0", opacity=0.35)
    part.shadow(c, 372, 356, 66, 13, 0.55)
    c.solid(oval(350, 302, 56), "#d8342c")


def _sailing_boat(c: Canvas) -> None:
    part.sky(c, part.DAY, 210)
    part.cloud(c, 150, 88, 150)
    part.cloud(c, 500, 62, 110)
    part.hills(c, 214, 90, "#9dbfae", "#7fae9a", 1.2)
    part.hills(c, 214, 48, "#6ea36d", "#4c8557", 2.3)
    part.water(c, 208, "#8fc4dc", "#2d6f9e")
    c.fill(soft(area(oval(338, 322, 84, 11)), 4), "#123a5c", opacity=0.45)
    c.stroke(3, points((340, 296), (340, 112)), "#6b4a2e")
    c.shape(smooth((334, 120), (290, 205), (250, 282), (334, 284)), WHITE, "#d8dfe8")
    c.shape(points((346, 134), (398, 282), (346, 284)), "#f2a13c", "#d97b22")
    c.shape(points((240, 294), (430, 294), (402, 322), (272, 322)), "#b5472f", "#7c2b1e")
    c.shape(box(238, 290, 194, 7), "#f0e3cb")


def _balloon(c: Canvas) -> None:
    part.sky(c, ("#5aa9e6", "#fdeccf"), 280)
    part.cloud(c, 120, 110, 130)
    part.cloud(c, 560, 160, 150)
    part.hills(c, 268, 50, "#a9c6a0", "#8fb584", 1.4)
    part.plain(c, 266, "#9cc06a", "#6f9d45")
    fields = ("#d9c15b", "#7fae4c", "#c79a4b", "#94bd5c", "#e0d27a")
    for k in range(-5, 5):
        for near, far, shift in ((0.18, 0.42, 0), (0.46, 1.0, 2)):
            edges = ((k, near), (k + 1, near), (k + 1, far), (k, far))
            corners = [(320 + side * (60 + 150 * t), 266 + 134 * t) for side, t in edges]
            tint = fields[(k + shift) % 5]
            c.shape(points(*corners), tint, mix(tint, "#304010", 0.2), 0.8)
    for k in range(9):
        part.tree(c, 40 + 72 * k, 300 + 9 * (k % 3), 26 + 4 * (k % 2), "#55883f")
    part.balloon(c, 318, 136, 84, ("#d9403a", "#f7d154"))


def _paper_plane(c: Canvas) -> None:
    part.sky(c, ("#6db7e8", "#fbe6d4"), 330)
    part.cloud(c, 500, 90, 170)
    part.cloud(c, 130, 150, 120)
    part.towers(c, 400, ("#b9a7c4", "#c4b3b8", "#a9a2c2"), 190)
    for k in range(7):
        wall, roof = ("#ead8bb", "#d9c1a5", "#e8cfc0")[k % 3], ("#b9583f", "#8f4a3b")[k % 2]
        part.house(c, 45 + 95 * k, 396 + 8 * (k % 2), 92, wall, roof)
    c.shape(points((190, 190), (420, 118), (268, 208)), WHITE, "#e6edf4")
    c.shape(points((268, 208), (420, 118), (292, 250)), "#c2cedb", "#a9b8c9")
    c.shape(points((292, 250), (420, 118), (356, 222)), "#f4f8fc", "#dbe4ee")


def _kite(c: Canvas) -> None:
    part.sky(c, ("#3f97da", "#d8f1f6"), 290)
    part.cloud(c, 520, 130, 150)
    part.cloud(c, 90, 80, 110)
    part.water(c, 268, "#65b8cf", "#3f9dbd", 50)
    part.ground(c, smooth((0, 316), (200, 330), (430, 312), (640, 336), closed=False), "#f2dfb0", "#dcbf84")
    c.stroke(5, smooth((0, 316), (200, 330), (430, 312), (640, 336), closed=False), WHITE, 0.7)
    c.stroke(1.3, smooth((330, 124), (262, 240), (179, 345), closed=False), "#5c6470")
    c.stroke(3, smooth((356, 176), (392, 206), (384, 240), (428, 262), (430, 300), closed=False), "#7d3f98")
    for x, y, turn in ((391, 212, 20), (392, 245, 60), (428, 270, 20)):
        c.shape(place(points((-13, -6), (0, 0), (-13, 6), (13, 6), (0, 0), (13, -6)), x, y, 1, turn), "#f4b72f")
    for corners, tint in (
        (((0, -80), (-52, -22), (0, -12)), "#e4453a"),
        (((0, -80), (52, -22), (0, -12)), "#f4b72f"),
        (((-52, -22), (0, 84), (0, -12)), "#f4b72f"),
        (((52, -22), (0, 84), (0, -12)), "#c93a30"),
    ):
        c.shape(place(points(*corners), 330, 108, 0.95, -16), mix(tint, WHITE, 0.15), tint)
    part.person(c, 168, 386, 42, "#d8452f")


def _train(c: Canvas) -> None:
    part.sky(c, ("#76b7e0", "#fdf0d8"), 300)
    part.mountain(c, 160, 340, 240, "#8a9ab8")
    part.mountain(c, 500, 340, 220, "#93a3bf")
    part.hills(c, 308, 80, "#9cc3a0", "#6f9f78", 1.2)
    part.hills(c, 350, 70, "#7dac72", "#4f8652", 1.7)
    part.water(c, 352, "#7fb6c9", "#3f7f9c", 30)
    arches = [oval(75 + 145 * k, 318, 54, 58) for k in range(-1, 5)]
    legs = [box(21 + 145 * k, 318, 108, 82) for k in range(-1, 5)]
    wall = without(area(box(0, 222, WIDTH, 150)), area(*arches, *legs))
    c.fill(wall, "#c2a98a", "#8a745c")
    c.texture(wall, 0.08, 22, 8)
    c.fill(area(box(0, 214, WIDTH, 9), box(0, 238, WIDTH, 3)), "#6d5844")
    _locomotive(c)


def _locomotive(c: Canvas) -> None:
    part.smoke(c, [(436, 112, 15), (410, 92, 21), (374, 78, 26), (330, 68, 30), (280, 62, 33)])
    for x, tint in ((70, "#3f7cac"), (178, "#3f7cac")):
        c.shape(box(x, 150, 100, 52), mix(tint, WHITE, 0.15), tint)
        c.shape(box(x - 3, 144, 106, 8), "#dfe5ea")
        c.fill(area(*(box(x + 9 + 29 * k, 160, 22, 19) for k in range(3))), "#fdf3c8")
    c.shape(box(286, 128, 62, 74), "#c23b30", "#8f241d")
    c.shape(box(280, 122, 74, 8), "#33363d")
    c.shape(box(298, 140, 34, 26), "#fdf3c8")
    c.shape(box(346, 154, 106, 46), "#e05a4c", "#8f241d")
    c.fill(area(box(428, 122, 16, 34), box(423, 118, 26, 8), box(380, 142, 20, 14)), "#33363d")
    c.shape(points((452, 184), (476, 208), (440, 208)), "#33363d")
    for x, r in ((88, 9), (152, 9), (196, 9), (260, 9), (306, 13), (344, 13), (384, 13), (428, 9)):
        part.wheel(c, x, 214 - r, r, "#23252b", "#b33a30")


def _coast_car(c: Canvas) -> None:
    part.sky(c, part.DAY, 190)
    part.cloud(c, 480, 80, 150)
    part.water(c, 186, "#58b6d4", "#2a83b4", 70)
    c.shape(smooth((-30, 196), (50, 130), (130, 120), (190, 160), (250, 196)), "#8fb589", "#6f9f78")
    part.ground(c, smooth((0, 262), (220, 250), (430, 262), (640, 250), closed=False), "#b7c77a", "#7fa052")
    part.road(c, 296, 74)
    c.fill(area(*(box(8 + 64 * k, 268, 5, 24) for k in range(10)), box(0, 272, WIDTH, 6)), "#eef1f3", "#c5cbd1")
    _car(c, 316, 342, "#f2b92c")
    part.grass(c, 372, 150, "#5c8a3c")


def _car(c: Canvas, x: float, y: float, colour: str) -> None:
    """A small car that faces left."""
    part.shadow(c, x, y + 2, 122, 9, 0.55)
    bonnet, boot = [(-112, -14), (-112, -40), (-84, -54), (-44, -58)], [(60, -60), (104, -52), (114, -30), (110, -12)]
    body = smooth(*bonnet, *boot, (0, -10))
    cabin = smooth((-52, -56), (-24, -88), (10, -96), (52, -92), (82, -58))
    c.shape(place(cabin, x, y), mix(colour, WHITE, 0.25), colour)
    c.shape(place(points((-38, -58), (-18, -82), (10, -87), (10, -58)), x, y), "#cfe9f3", "#8fbacb")
    c.shape(place(points((18, -58), (18, -87), (48, -84), (66, -58)), x, y), "#cfe9f3", "#8fbacb")
    c.shape(place(body, x, y), mix(colour, WHITE, 0.18), mix(colour, "#502000", 0.3))
    c.shape(oval(x - 102, y - 40, 8, 7), "#fff8d8")
    c.shape(box(x + 104, y - 46, 8, 10), "#c8322a")
    for dx in (-66, 68):
        part.wheel(c, x + dx, y - 18, 21)


def _pendulum(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, HEIGHT), "#49706b", "#2f504f")
    for k in range(16):
        c.shape(box(40 * k, 0, 18, HEIGHT), WHITE, opacity=0.05)
    c.fill(soft(area(box(244, 44, 190, 340)), 12), "#081414", opacity=0.5)
    c.shape(box(226, 34, 188, 336), "#8c5a33", "#5c361c")
    c.texture(area(box(226, 34, 188, 336)), 0.1, 4, 120)
    c.shape(points((212, 38), (244, 14), (396, 14), (428, 38)), "#9c683c", "#6f4424")
    c.shape(points((220, 370), (420, 370), (396, 388), (244, 388)), "#7f5230", "#4a2b16")
    c.shape(box(244, 172, 152, 182), "#2a1a12", "#3c261a")
    c.shape(oval(320, 104, 64), "#d8aa4e", "#8d6220")
    c.shape(oval(320, 104, 56), "#fbf5e4", "#e9dcc0")
    for k in range(12):
        c.shape(place(box(-2, -51, 4, 11), 320, 104, 1, 30 * k), "#3a2a20")
    c.fill(line(4, points((320, 104), (292, 86)), points((320, 104), (338, 66))), "#2a1c14")
    c.fill(line(5, points((320, 168), (274, 296))), "#e0b65c", "#b98a34")
    c.solid(oval(272, 300, 27), "#e2ae3c")
    c.shape(points((330, 172), (390, 172), (310, 354), (250, 354)), WHITE, opacity=0.08)


def _cable_car(c: Canvas) -> None:
    part.sky(c, part.DAY, 300)
    part.cloud(c, 110, 96, 150)
    part.mountain(c, 470, 400, 330, "#7f90b0")
    part.mountain(c, 120, 400, 210, "#93a3bf")
    part.hills(c, 392, 90, "#6fa070", "#3f7350", 1.6)
    for k in range(9):
        part.pine(c, 30 + 76 * k, 392 + 10 * (k % 2), 70 + 24 * ((k * 2) % 3))
    c.stroke(2.5, points((-10, 250), (650, 52)), "#3b4250")
    c.fill(line(4, points((318, 152), (318, 182))), "#4a5260")
    c.fill(area(place(box(-22, -6, 44, 9), 318, 150, 1, -17)), "#2f3540")
    cabin = smooth((262, 184), (374, 184), (384, 230), (368, 272), (268, 272), (252, 230))
    c.shape(cabin, "#ee5a4a", "#a82c26")
    panes = area(box(250, 196, 36, 36), box(292, 196, 52, 36), box(350, 196, 36, 36))
    c.fill(both(area(cabin), panes), "#d8eef6", "#8fb8cc")
    c.shape(box(262, 180, 112, 7), "#f3f0ea", "#c9c4bc")


def _rolling_wheel(c: Canvas) -> None:
    part.sky(c, part.DAY, 260)
    part.cloud(c, 470, 96, 180)
    part.cloud(c, 200, 70, 120)
    part.hills(c, 300, 80, "#a2cba6", "#7cb083", 1.3)
    part.ground(c, smooth((0, 196), (200, 252), (420, 320), (640, 352), closed=False), "#92c55e", "#4d8c3a")
    for x, y, size in ((560, 344, 110), (612, 352, 80)):
        part.tree(c, x, y, size)
    part.shadow(c, 296, 284, 62, 8, 0.4)
    part.wheel(c, 270, 196, 78, "#8d5a30", "#d2a469", 8)
    part.grass(c, 356, 170, "#3f7d33")


def _rocket(c: Canvas) -> None:
    part.sky(c, ("#1b2a5e", "#f3a878"), 360)
    part.stars(c, 50, 150)
    part.hills(c, 372, 46, "#7a5a70", "#5a4058", 1.6)
    part.plain(c, 362, "#6a5a60", "#463a44")
    c.fill(area(box(214, 140, 14, 226), *(box(214, 150 + 36 * k, 62, 6) for k in range(4))), "#8a3f36", "#5a2a2c")
    c.fill(soft(area(oval(320, 320, 130, 100)), 50), "#ffb050", opacity=0.6)
    jet = points((0, 1), (0.3, 0.4), (0.22, 0), (-0.22, 0), (-0.3, 0.4))
    for size, tint in ((120, "#ff8a2a"), (92, "#ffd04a"), (56, "#fffbe0")):
        c.fill(soft(area(place(jet, 320, 246, size)), 3), tint)
    left = ((150, 378, 40), (215, 372, 50), (280, 366, 44))
    for x, y, r in (*left, (360, 366, 46), (430, 374, 52), (500, 380, 38), (320, 384, 54)):
        c.fill(soft(area(oval(x, y, r, r * 0.8)), 5), "#fdeede", "#c99a90", 0.9)
    hull = smooth((320, 40), (352, 96), (358, 170), (350, 244), (290, 244), (282, 170), (288, 96))
    for side in (-1, 1):
        c.shape(place(smooth((30, -70), (66, -20), (68, 18), (28, -8)), 320, 250, side), "#d8392f", "#8f201c")
    c.shape(hull, "#f7f7fa", "#d5d9e4")
    c.fill(both(area(hull), area(box(270, 30, 100, 52))), "#d8392f")
    c.fill(both(area(hull), soft(area(box(338, 30, 40, 230)), 8)), "#20244a", opacity=0.45)
    c.shape(oval(320, 128, 20), "#8f98a8")
    c.shape(oval(320, 128, 15), "#bfe4f4", "#3f7fa8")


def _submarine(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, HEIGHT), "#2f8fb8", "#061c40")
    part.rays(c, (150, 330, 520), 300, 0.1)
    for base, tint in ((330, "#13507a"), (372, "#0d3a60")):
        part.hills(c, base + 20, 70, mix(tint, WHITE, 0.08), tint, 1.0)
    c.fill(soft(area(points((190, 196), (190, 214), (-10, 300), (-10, 170))), 6), "#fff6c0", opacity=0.35)
    c.shape(box(296, 106, 74, 46), "#f7c93c", "#d29a22")
    c.fill(line(6, points((338, 110), (338, 78), (316, 78))), "#d29a22")
    c.shape(points((446, 204), (500, 160), (500, 248)), "#d9822a", "#a85a1c")
    upper, lower = [(180, 204), (214, 156), (300, 140), (400, 148), (470, 188)], [(474, 220), (400, 258), (300, 266)]
    c.solid(smooth(*upper, *lower, (214, 250)), "#f4bf30", (-0.2, -0.5), 0.4)
    for x in (246, 312, 378):
        c.shape(oval(x, 200, 22), "#b98a34", "#7a5316")
        c.shape(oval(x, 200, 16), "#c9eef8", "#5fa9c8")
    bubbles = [(490, 130, 7), (508, 104, 10), (482, 82, 6), (520, 60, 8), (498, 36, 5), (150, 110, 5), (160, 84, 7)]
    c.fill(area(*(oval(x, y, r) for x, y, r in bubbles)), "#d8f4fb", "#8fd0e4", 0.6)


THINGS: tuple[Scene, ...] = (
    Scene("A red ball rolls slowly to the left across the wooden floor of a sunlit room.", _ball),
    Scene("A small sailing boat glides to the left on a calm lake before green hills.", _sailing_boat),
    Scene("A striped hot-air balloon rises slowly up into the sky above a patchwork of fields.", _balloon),
    Scene("A white paper plane flies fast to the right over the roofs of a town.", _paper_plane),
    Scene("A bright kite dances in the wind above the beach while its tail flutters.", _kite),
    Scene("A steam train drives to the right over a stone bridge, and its smoke trails behind it.", _train),
    Scene("A yellow car drives quickly to the left along a coast road.", _coast_car),
    Scene("A red cable car climbs slowly up to the right towards a snowy mountain.", _cable_car),
    Scene("The brass pendulum of a wall clock swings evenly from side to side.", _pendulum),
    Scene("A wooden wheel rolls fast down a grassy slope to the right.", _rolling_wheel),
    Scene("A rocket lifts off and climbs straight up on fire and smoke.", _rocket),
    Scene("A yellow submarine sinks slowly down through the deep sea as bubbles float by.", _submarine),
)
