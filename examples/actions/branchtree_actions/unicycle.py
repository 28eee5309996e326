"""A unicycle that is to stop at a goal behind an obstacle; a chunk of actions is a whole drive."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

from branchtree_actions.task import Array, Outcome, Pixels, Point, Pose, Scene, Task, rotation

STEP = 0.25  # seconds
NEAR, RADIUS = 0.3, 0.35  # a success ends this near to the goal, and does not touch the obstacle, a disc
MARGIN, COST = 0.45, 2.0  # a drive that comes nearer to its middle than the margin pays for each unit
FASTEST, SHARPEST = 1.2, 2.0  # speed and turning rate are clipped to these
SIDE, SPACE = 192, 0.65  # of a picture, in pixels, and the room around start and goal


class Drive(Scene, frozen=True):
    """The unicycle's pose, and what is around it."""

    pose: Pose
    goal: Point
    obstacle: Point


class Unicycle(Task):
    """Actions are speed and turning rate. The return falls with the distance left and by cutting into the obstacle."""

    name, prompt, scene, observation_size = "unicycle", "drive to the goal", Drive, 4

    def draw_scene(self, rng: np.random.Generator) -> Drive:
        """A goal 1.5 to 3 away, more or less ahead, and an obstacle near the straight line to it."""
        pose = np.array([*rng.uniform(-1, 1, 2), rng.uniform(-math.pi, math.pi)])
        angle, distance = pose[2] + rng.uniform(-1.2, 1.2), rng.uniform(1.5, 3)
        way = np.array([math.cos(angle), math.sin(angle)])
        obstacle = pose[:2] + distance * rng.uniform(0.4, 0.6) * way + rng.uniform(-0.5, 0.5) * way[::-1] * [-1, 1]
        numbers = {"pose": pose, "goal": pose[:2] + distance * way, "obstacle": obstacle}
        return Drive(**{key: tuple(value.round(3)) for key, value in numbers.items()})

    def observe(self, scene: Drive) -> Array:
        """Goal and obstacle as seen from the unicycle."""
        seen: Array = (np.array([scene.goal, scene.obstacle]) - scene.pose[:2]) @ rotation(scene.pose[2]) / 2
        return seen.flatten()

    def demonstrate(self, scene: Drive, rng: np.random.Generator) -> Array:
        """Steer to the goal with a wrong aim and speed, and around the obstacle half of the time."""
        pose, (goal, obstacle) = np.array(scene.pose), np.array([scene.goal, scene.obstacle])
        aim, haste, careful = rng.normal(0, 0.12), rng.uniform(0.75, 1.05), rng.random() < 0.5
        side, actions = math.copysign(1, rng.normal()), np.empty((self.horizon, 2))
        for step in range(self.horizon):
            target, ahead = goal, obstacle - pose[:2]
            if careful and np.hypot(*ahead) < 2.5 * RADIUS and ahead @ (goal - pose[:2]) > 0:
                target = obstacle + side * 2 * RADIUS * np.array([-ahead[1], ahead[0]]) / np.hypot(*ahead)
            error = math.remainder(math.atan2(*(target - pose[:2])[::-1]) - pose[2] + aim, math.tau)
            speed = haste * min(1.0, 2 * np.hypot(*(goal - pose[:2]))) * max(math.cos(error), 0.2)
            actions[step] = np.array([speed, np.clip(3 * error, -SHARPEST, SHARPEST)]) + rng.normal(0, [0.05, 0.2])
            pose = _move(pose[None], actions[step : step + 1])[0]
        return actions

    def run(self, scenes: Sequence[Drive], actions: Array) -> Outcome:
        """Drive; all scenes at once."""
        pose, goal, obstacle = (np.array([getattr(scene, key) for scene in scenes]) for key in Drive.model_fields)
        paths = np.stack([*accumulate(actions.swapaxes(0, 1), _move, initial=pose)], axis=1)[..., :2]
        distance = np.linalg.norm(paths[:, -1] - goal, axis=-1)
        closest = np.linalg.norm(paths - obstacle[:, None], axis=-1).min(axis=1)
        cost = COST * np.clip(MARGIN - closest, 0, None)
        return Outcome(paths, -distance - cost, (distance < NEAR) & (closest > RADIUS))

    def picture(self, scene: Drive, actions: Array) -> Pixels:
        """The drive from above: obstacle grey, goal green, black at the start; the path is red unless it succeeds."""
        start, outcome = np.array(scene.pose[:2]), self.run([scene], actions[None])
        middle, image = (start + scene.goal) / 2, Image.new("RGB", (SIDE, SIDE), "white")
        scale, draw = SIDE / (np.hypot(*(start - scene.goal)) + 2 * SPACE), ImageDraw.Draw(image)

        def pixels(points: Array) -> list[tuple[float, ...]]:
            return [tuple(point) for point in SIDE / 2 + scale * (points - middle) * [1, -1]]

        discs = (scene.obstacle, RADIUS, "darkgrey"), (scene.goal, NEAR, "lightgreen"), (start, 0.12, "black")
        for point, radius, colour in discs:
            draw.ellipse(pixels(np.array(point) + radius * np.array([[-1, 1], [1, -1]])), fill=colour)
        draw.line(pixels(outcome.paths[0]), fill="royalblue" if outcome.success[0] else "crimson", width=5)
        return np.asarray(image)


def _move(pose: Array, action: Array) -> Array:
    """Return the poses (B, 3) one step later, under actions (B, 2)."""
    speed, rate = np.clip(action[:, 0], 0, FASTEST), np.clip(action[:, 1], -SHARPEST, SHARPEST)
    heading = pose[:, 2] + rate * STEP
    x, y = (pose[:, axis] + speed * STEP * turn(heading) for axis, turn in enumerate((np.cos, np.sin)))
    return np.stack([x, y, heading], axis=1)
