"""A unicycle that is to stop at a goal behind an obstacle; a chunk of actions is a whole drive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from branchtree_actions.task import Array, Outcome, Point, Pose, Scene, Task

STEP = 0.25  # seconds
NEAR = 0.3  # how far from the goal a drive may end
RADIUS = 0.35  # of the obstacle
CRASH = 0.5  # what touching the obstacle costs
FASTEST, SHARPEST = 1.2, 2.0  # speed and turning rate are clipped to these
SIDE = 96  # of a picture


class Drive(Scene):
    """The unicycle's pose, and what is around it."""

    pose: Pose
    goal: Point
    obstacle: Point


class Unicycle(Task):
    """Actions are speed and turning rate. The return is minus the distance left, minus 0.5 for touching the obstacle."""

    name = "unicycle"
    prompt = "drive to the goal"
    scene = Drive
    horizon = 16
    observation_size = 4

    def draw_scene(self, rng: np.random.Generator) -> Drive:
        """A goal 1.5 to 3 away in any direction, and an obstacle near the straight line to it."""
        pose = np.array([*rng.uniform(-1, 1, 2), rng.uniform(-math.pi, math.pi)])
        angle, distance = pose[2] + rng.uniform(-1.2, 1.2), rng.uniform(1.5, 3)
        way = np.array([math.cos(angle), math.sin(angle)])
        obstacle = pose[:2] + distance * rng.uniform(0.4, 0.6) * way + rng.uniform(-0.5, 0.5) * way[::-1] * [-1, 1]
        goal = pose[:2] + distance * way
        return Drive(pose=pose.round(3).tolist(), goal=goal.round(3).tolist(), obstacle=obstacle.round(3).tolist())

    def observe(self, scene: Drive) -> Array:
        """Goal and obstacle as seen from the unicycle."""
        x, y, heading = scene.pose
        seen = np.array([scene.goal, scene.obstacle]) - [x, y]
        turn = np.array([[math.cos(heading), -math.sin(heading)], [math.sin(heading), math.cos(heading)]])
        return (seen @ turn).flatten() / 2

    def demonstrate(self, scene: Drive, rng: np.random.Generator) -> Array:
        """Steer to the goal with a wrong aim and speed, and around the obstacle half of the time."""
        pose, (goal, obstacle) = np.array(scene.pose), np.array([scene.goal, scene.obstacle])
        aim, haste, careful = rng.normal(0, 0.12), rng.uniform(0.75, 1.05), rng.random() < 0.5
        side = math.copysign(1, rng.normal())
        actions = np.empty((self.horizon, 2))
        for action in actions:
            target, ahead = goal, obstacle - pose[:2]
            if careful and np.hypot(*ahead) < 2.5 * RADIUS and ahead @ (goal - pose[:2]) > 0:
                target = obstacle + side * 2 * RADIUS * np.array([-ahead[1], ahead[0]]) / np.hypot(*ahead)
            dx, dy = target - pose[:2]
            error = math.remainder(math.atan2(dy, dx) - pose[2] + aim, math.tau)
            left = np.hypot(*(goal - pose[:2]))
            action[:] = haste * min(1.0, 2 * left) * max(math.cos(error), 0.2), np.clip(3 * error, -SHARPEST, SHARPEST)
            action += rng.normal(0, [0.05, 0.2])
            pose = _move(pose[None], action[None])[0]
        return actions

    def run(self, scenes: Sequence[Drive], actions: Array) -> Outcome:
        """Drive; all scenes at once."""
        pose = np.array([scene.pose for scene in scenes])
        goal, obstacle = (np.array([getattr(scene, key) for scene in scenes]) for key in ("goal", "obstacle"))
        poses = [pose]
        for step in range(self.horizon):
            poses.append(_move(poses[-1], actions[:, step]))
        paths = np.stack(poses, axis=1)[..., :2]
        distance = np.hypot(*(paths[:, -1] - goal).T)
        crashed = np.hypot(*np.moveaxis(paths - obstacle[:, None], -1, 0)).min(axis=1) < RADIUS
        return Outcome(paths, -distance - CRASH * crashed, (distance < NEAR) & ~crashed)

    def picture(self, scene: Drive, actions: Array) -> Image.Image:
        """The drive from above: obstacle grey, goal green, path blue."""
        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        middle = (np.array(scene.pose[:2]) + scene.goal) / 2

        def pixels(points: Array) -> list[tuple[float, float]]:
            return [(x, y) for x, y in SIDE / 2 + SIDE / 5 * (points - middle) * [1, -1]]

        for point, size, colour in ((scene.obstacle, RADIUS, "lightgrey"), (scene.goal, NEAR, "lightgreen")):
            corner = np.array([size, -size])
            draw.ellipse([*pixels(np.array([point - corner, point + corner]))], fill=colour)
        path = self.run([scene], actions[None]).paths[0]
        draw.line(pixels(path), fill="royalblue", width=2)
        return image


def _move(pose: Array, action: Array) -> Array:
    """Return the poses (B, 3) one step later, under actions (B, 2)."""
    speed, rate = np.clip(action[:, 0], 0, FASTEST), np.clip(action[:, 1], -SHARPEST, SHARPEST)
    heading = pose[:, 2] + rate * STEP
    return np.stack(
        [pose[:, 0] + speed * STEP * np.cos(heading), pose[:, 1] + speed * STEP * np.sin(heading), heading], 1
    )
