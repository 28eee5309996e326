"""Held-out scenes: other subjects and other arrangements than the training scenes."""

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


def _duck(c: Canvas) -> None:
    part.sky(c, ("#9fd0e6", "#eef6e6"), 140)
    part.hills(c, 150, 70, "#8fbf86", "#5f9a5c", 2.4)
    part.water(c, 140, "#8cc7bf", "#2f7f86", 60)
    for x, y, size in ((90, 210, 30), (540, 200, 26), (480, 344, 46), (120, 366, 52), (590, 290, 36)):
        pad = both(area(oval(x, y, size * 1.3, size * 0.42)), area(box(x - size * 2, y - size, size * 4, size * 2)))
        c.fill(pad, "#76b854", "#3f8a3c")
        for angle in (-60, -25, 0, 25, 60):
            petal = smooth((0, 0), (0.14, -0.3), (0, -0.62), (-0.14, -0.3))
            c.shape(place(petal, x, y, size, angle), "#fbe3ee", "#f0a8c4")
    for ripple in (1.0, 1.35, 1.7):
        ring = area(oval(330, 306, 118 * ripple, 20 * ripple)), area(oval(330, 305, 115 * ripple, 18.6 * ripple))
        c.fill(without(*ring), WHITE, opacity=0.4)
    c.shape(smooth((418, 268), (470, 216), (456, 270), (420, 292)), "#f3cf4a", "#d9a52c")
    body = smooth((232, 262), (280, 240), (350, 236), (430, 256), (428, 296), (340, 312), (262, 304))
    c.solid(body, "#f7d548", (0, -0.5), 0.25)
    c.shape(points((226, 190), (176, 206), (228, 220)), "#f08a2c", "#c9601c")
    c.solid(oval(262, 204, 46), "#f9da52", (0.1, -0.4), 0.22)
    c.shape(smooth((310, 262), (370, 250), (420, 262), (376, 290), (324, 286)), "#e0b030", opacity=0.8)
    c.shape(oval(246, 192, 7), "#1c2430")
    c.shape(oval(244, 189, 2.4), WHITE)


def _bus(c: Canvas) -> None:
    part.sky(c, ("#f6b58a", "#fdeccf"), 260)
    part.sun(c, 540, 110, 30, "#fff0c0")
    part.towers(c, 310, ("#c99a9a", "#b58a9c", "#d2aa98"), 220, "#fbe6c4")
    part.towers(c, 310, ("#8a6a84", "#7a6486", "#94727c"), 130, "#ffdf9a")
    c.shape(box(0, 304, WIDTH, 18), "#c9bfb8", "#a89c96")
    part.road(c, 320, 80, "#5c5a66")
    for x in (60, 590):
        c.fill(area(box(x, 190, 5, 126), box(x - 2, 186, 34, 5)), "#3a3844")
        c.shape(oval(x + 28, 194, 8, 5), "#fff2c0")
    part.shadow(c, 322, 366, 190, 9, 0.5)
    top, front = [(140, 208), (320, 200), (500, 208)], [(514, 280), (508, 356)]
    c.shape(smooth(*top, *front, (320, 360), (138, 356), (132, 280)), "#4d9fe0", "#1f5aa0")
    c.fill(area(*(box(150 + 66 * k, 226, 56, 46) for k in range(5))), "#d8f0f8", "#8fb8d4")
    c.shape(smooth((480, 226), (502, 226), (508, 282), (480, 282)), "#d8f0f8", "#8fb8d4")
    c.fill(area(box(134, 288, 378, 8)), WHITE, opacity=0.9)
    c.shape(oval(506, 330, 7, 9), "#fff6c8")
    c.shape(box(132, 322, 6, 16), "#d8392f")
    for x in (214, 430):
        part.wheel(c, x, 354, 27)


def _tractor(c: Canvas) -> None:
    part.sky(c, part.DAY, 220)
    part.cloud(c, 470, 80, 190)
    part.hills(c, 222, 44, "#a4c88c", "#86b070", 1.2)
    part.house(c, 110, 230, 84, "#c8493c", "#6b3a34", "#f4ead8")
    for x in (30, 190, 560):
        part.tree(c, x, 236, 70)
    part.plain(c, 224, "#c9a868", "#8a6236", 0.08)
    furrows = [points((320 + 50 * k, 226), (320 + 190 * k, 400)) for k in range(-8, 9)]
    c.fill(line(3, *furrows), "#6b4826", opacity=0.5)
    part.shadow(c, 330, 344, 140, 12, 0.5)
    c.shape(points((196, 232), (330, 226), (330, 300), (190, 304)), "#5fae4c", "#2f7a34")
    c.fill(area(box(196, 244, 60, 5), box(196, 256, 60, 5), box(196, 268, 60, 5)), "#22521f", opacity=0.7)
    c.fill(area(box(236, 176, 9, 56), box(232, 172, 17, 8)), "#30343a")
    c.fill(area(box(322, 148, 8, 90), box(422, 148, 8, 90), box(310, 138, 134, 13)), "#2f7a34")
    c.shape(box(330, 151, 92, 70), "#d4edf5", "#9cc6d6")
    c.shape(points((322, 220), (444, 220), (452, 296), (322, 300)), "#5fae4c", "#2f7a34")
    part.wheel(c, 400, 278, 66, "#2a2c30", "#f0c53a")
    part.wheel(c, 222, 310, 36, "#2a2c30", "#f0c53a")
    part.smoke(c, [(246, 156, 9), (262, 134, 13), (286, 112, 17)], "#e6e8ec", 0.6)


def _jellyfish(c: Canvas) -> None:
    c.shape(box(0, 0, WIDTH, HEIGHT), "#1c4f96", "#050f2e")
    part.rays(c, (120, 300, 470, 640), 380, 0.1)
    for x, y, size, tint in ((540, 130, 34, "#7f9fe8"), (110, 250, 28, "#8f8fe0"), (320, 150, 92, "#f48ac0")):
        for k in range(-3, 4):
            root, length = 0.24 * k, 2.0 - 0.12 * abs(k)
            tail = [(root, 0.3), (root + 0.1, 0.9), (root - 0.08, 1.4), (root + 0.08, length)]
            c.stroke(size * 0.06, place(smooth(*tail, closed=False), x, y, size), mix(tint, WHITE, 0.3), 0.7)
        c.fill(soft(area(oval(x, y, size * 1.3)), size * 0.4), tint, opacity=0.35)
        dome = [(-1, 0.34), (-0.92, -0.2), (-0.5, -0.72), (0, -0.88), (0.5, -0.72), (0.92, -0.2), (1, 0.34)]
        bell = smooth(*dome, (0.5, 0.24), (0, 0.4), (-0.5, 0.24))
        c.shape(place(bell, x, y, size), mix(tint, WHITE, 0.35), tint, 0.92)
        c.shape(place(bell, x, y + size * 0.06, size * 0.62), mix(tint, WHITE, 0.6), tint, 0.5)
        gleam = place(oval(-0.4, -0.4, 0.2, 0.14), x, y, size)
        c.fill(soft(area(gleam), size * 0.06), WHITE, opacity=0.7)
    specks = c.source.uniform((0, 0, 0.6), (WIDTH, HEIGHT, 2), (60, 3))
    c.fill(area(*(oval(x, y, r) for x, y, r in specks)), "#bfe0ff", opacity=0.5)


def _castle_flag(c: Canvas) -> None:
    part.sky(c, ("#5a8fd0", "#fde6c8"), 330)
    for x, y, size in ((100, 120, 170), (560, 210, 180)):
        part.cloud(c, x, y, size, WHITE, "#e6cfd0")
    part.hills(c, 352, 80, "#8fb890", "#5f8f6a", 1.5)
    for x, y, width, height in ((150, 400, 310, 110), (70, 400, 96, 150), (440, 400, 96, 170), (238, 400, 124, 236)):
        wall = [box(x, y - height, width, height)]
        teeth = [box(x - 6 + k * (width + 12) / 7, y - height - 18, (width + 12) / 7, 20) for k in range(0, 7, 2)]
        c.fill(area(*wall, *teeth, box(x - 6, y - height - 2, width + 12, 10)), "#c9bfb4", "#8d8580")
        c.texture(area(*wall), 0.07, 24, 9)
        shade = area(box(x + width * 0.72, y - height, width * 0.4, height))
        c.fill(both(area(*wall), soft(shade, 9)), "#201828", opacity=0.3)
    for x in (118, 300, 488):
        c.shape(smooth((x - 9, 300), (x, 280), (x + 9, 300), (x + 9, 326), (x - 9, 326)), "#332a33")
    c.shape(box(297, 22, 6, 130), "#5a4634")
    c.shape(oval(300, 20, 7), "#e0b84a")
    flag = smooth((303, 30), (350, 20), (400, 42), (452, 30), (486, 40), closed=False)
    c.shape(part.band(flag, 74), "#ef5144", "#a82420")
    c.shape(part.band(flag + points((0, 28)), 18), "#f6d254", opacity=0.95)


def _beach_ball(c: Canvas) -> None:
    part.sky(c, ("#57b4ea", "#e8f7f6"), 200)
    part.sun(c, 110, 80, 30)
    part.cloud(c, 520, 96, 150)
    part.water(c, 186, "#4fb8c8", "#6fd0cc", 60)
    shore = smooth((0, 258), (160, 246), (330, 266), (500, 248), (640, 262), closed=False)
    part.ground(c, shore, "#f6e4b4", "#e2c486")
    c.stroke(7, shore, WHITE, 0.75)
    c.stroke(9, smooth((578, 400), (586, 300), (560, 190), (530, 130), closed=False), "#8d6238")
    for angle in (-170, -140, -100, -60, -20, 20):
        frond = smooth((0, 0), (0.5, -0.2), (1, 0.16), (0.5, -0.03))
        c.shape(place(frond, 530, 132, 110, angle), "#4aa25a", "#2c7a44")
    part.shadow(c, 304, 368, 62, 11, 0.4)
    ball = area(oval(290, 266, 62))
    c.fill(ball, WHITE)
    for k, tint in enumerate(("#e8453c", "#3d8fd6", "#f5c53a")):
        wedge = [(0, 0), *((130 * dx, 130 * dy) for dx, dy in ((0.0, -1.0), (0.6, -0.8), (0.87, -0.5)))]
        c.fill(both(ball, area(place(points(*wedge), 278, 252, 1, 120 * k + 20))), tint)
    c.shape(oval(278, 252, 9), "#fdfdfd")
    c.fill(both(ball, soft(without(ball, area(oval(276, 250, 58))), 9)), "#101840", opacity=0.5)
    c.fill(soft(area(oval(262, 232, 11, 7)), 3), WHITE, opacity=0.8)


def _airship(c: Canvas) -> None:
    part.sky(c, ("#4c86c4", "#fbdcd0"), 330)
    part.cloud(c, 110, 210, 170)
    part.cloud(c, 540, 110, 150)
    for x, height, tint in ((90, 190, "#8d9cc4"), (330, 150, "#97a6cc"), (560, 210, "#8595c0")):
        part.mountain(c, x, 392, height, tint, 0.45)
    part.hills(c, 400, 50, "#dfe8f4", "#b4c4de", 2)
    for k in range(12):
        part.pine(c, 20 + 56 * k, 398, 40 + 14 * ((k * 2) % 3), "#33605c", snow=True)
    for side in (1, -1):
        fin = points((186, 0), (124, -62 * side), (158, -62 * side), (236, -30 * side))
        c.shape(place(fin, 0, 150), "#c8453c", "#8f2a26")
    upper, lower = [(150, 150), (230, 100), (340, 88), (440, 108)], [(492, 150), (440, 192), (340, 212), (230, 200)]
    c.solid(smooth(*upper, *lower), "#cfd6e0", (-0.1, -0.5), 0.4)
    for dy in (-30, 0, 32):
        seam = smooth((168, 150 + dy * 0.4), (330, 150 + dy * 1.2), (484, 150 + dy * 0.3), closed=False)
        c.stroke(1.5, seam, "#7a8698", 0.6)
    c.shape(smooth((278, 214), (390, 210), (376, 240), (292, 240)), "#c8453c", "#8f2a26")
    c.fill(area(*(box(296 + 20 * k, 217, 13, 10) for k in range(4))), "#fdf0c4")


def _two_balloons(c: Canvas) -> None:
    part.sky(c, ("#7d8fd0", "#fdc9b0"), 250)
    part.sun(c, 500, 214, 24, "#ffe6b8")
    part.mountain(c, 120, 262, 120, "#9a94c0", 0.1)
    part.mountain(c, 330, 262, 90, "#a89cc4", 0.1)
    part.hills(c, 262, 40, "#8d80ac", "#7a6f9c", 1.7)
    part.water(c, 256, "#f0bfb4", "#5d6aa8", 60)
    part.glitter(c, 500, 258, "#fff0d0")
    for x, y, rx in ((120, 262, 200), (420, 268, 240), (600, 258, 160)):
        c.fill(soft(area(oval(x, y, rx, 14)), 10), WHITE, opacity=0.6)
    part.balloon(c, 196, 150, 70, ("#2f8f9c", "#f6ecd4"))
    part.balloon(c, 436, 96, 42, ("#8d4fa8", "#f4b24a"))
    part.rocks(c, [(40, 404, 60), (110, 406, 40)], "#4a4668")
    for x, y, size in ((600, 404, 150), (556, 404, 110)):
        part.pine(c, x, y, size, "#3a4a6c")


HELD_OUT: tuple[Scene, ...] = (
    Scene("A yellow duck swims slowly to the left across a pond with water lilies.", _duck),
    Scene("A blue bus drives quickly to the right along a city street at sunset.", _bus),
    Scene("A green tractor crawls to the left across a ploughed field.", _tractor),
    Scene("A pink jellyfish pulses and floats gently up through the dark blue sea.", _jellyfish),
    Scene("A red flag waves in a strong wind on top of a castle tower.", _castle_flag),
    Scene("A striped ball bounces up and down on a sunny beach.", _beach_ball),
    Scene("A silver airship glides slowly to the right over snowy mountains.", _airship),
    Scene("Two balloons hang over a misty lake at dawn while the camera slowly zooms in.", _two_balloons),
)
