"""PushT (gym-pusht): push a T onto its mark. A chunk of actions is 1.6 seconds; an episode is several chunks."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from branchtree_actions.task import Array, Outcome, Pixels, Point, Pose, Scene, Task, rotation

MARK = np.array([256, 256, math.pi / 4])  # where the T belongs
CENTRE = np.array([0, 45], dtype=np.float64)  # the T's centre of gravity in its own frame
OUTLINE = 30.0 * np.array([(-2, 0), (2, 0), (2, 1), (0.5, 1), (0.5, 4), (-0.5, 4), (-0.5, 1), (-2, 1), (-2, 0)])
CLEAR = 110.0  # the distance from there at which the agent does not touch the T
SIDE, FRAME = 288, 48  # of a picture of the whole table, in pixels, and how much is cut off at each side


class Table(Scene, frozen=True):
    """The agent's position and the T's pose, in pixels of 512 and radians, as gym-pusht observes them."""

    agent: Point
    block: Pose


class PushT(Task):
    """Actions are targets of the agent, relative to where it is when the chunk begins. The return is the coverage."""

    name, prompt, scene, observation_size, action_scale = "pusht", "push the T onto its mark", Table, 6, 100.0
    needs = "gym-pusht"

    def draw_scene(self, rng: np.random.Generator) -> Table:
        """The T up to 100 pixels and 0.5 radians away from its mark, and the agent clear of it."""
        shift, angle = rng.uniform(20, 100), rng.uniform(-math.pi, math.pi)
        block = MARK + np.array([shift * math.cos(angle), shift * math.sin(angle), rng.uniform(-0.5, 0.5)])
        while True:
            agent = rng.uniform(60, 450, 2)
            if np.hypot(*(agent - _centre(block))) > CLEAR:
                return Table(agent=agent.round(1).tolist(), block=block.round(3).tolist())

    def observe(self, scene: Table) -> Array:
        """The agent and the T relative to the mark, and the T's angle."""
        turn = scene.block[2] - MARK[2]
        places = np.array([*scene.agent, *scene.block[:2]]) - np.tile(MARK[:2], 2)
        return np.array([*places / 100, math.sin(turn), math.cos(turn)])

    def demonstrate(self, scene: Table, rng: np.random.Generator) -> Array:
        """Go around the T and push it the way it has to go, with errors of aim and length; its angle is ignored."""
        agent, centre = np.array(scene.agent, dtype=np.float64), _centre(scene.block)
        way = _centre(MARK) - centre + rng.normal(0, 12, 2)
        length = max(np.hypot(*way), 1e-6)
        way, side = way / length, np.array([-way[1], way[0]]) / length
        start = centre - CLEAR * way + rng.normal(0, 20) * side
        around = centre + math.copysign(1.2 * CLEAR, (agent - centre) @ side) * side
        points = [agent, around, start] if (agent - centre) @ way > -CLEAR / 2 else [agent, start, start]
        end = start + (CLEAR - 45 + length * rng.uniform(0.4, 1.0)) * way
        targets = [np.interp(range(1, 17), [0, 4, 8, 16], axis) for axis in np.array([*points, end]).T]
        return np.stack(targets, axis=1) + rng.normal(0, 2, (self.horizon, 2)) - agent

    def run(self, scenes: Sequence[Table], actions: Array) -> Outcome:
        """Take each chunk in an environment that is reset to its scene."""
        return Outcome(*map(np.array, zip(*map(push, map(environment, scenes), actions), strict=True)))

    def picture(self, scene: Table, actions: Array) -> Pixels:
        """The environment's own picture of how the chunk ends, the agent's path in black, the first T in orange."""
        table = environment(scene)
        path, _, _ = push(table, actions)
        image = Image.fromarray(table.render())
        draw, scale, turn = ImageDraw.Draw(image), SIDE / 512, rotation(scene.block[2])
        for points, colour in ((path, "black"), (scene.block[:2] + OUTLINE @ turn.T, "darkorange")):
            draw.line([tuple(point) for point in scale * points], fill=colour, width=3)
        return np.asarray(image.crop((FRAME, FRAME, SIDE - FRAME, SIDE - FRAME)))


def environment(scene: Table) -> Any:
    """Return gym-pusht's environment, reset so that its observation is the scene."""
    from gym_pusht.envs.pusht import PushTEnv

    table = PushTEnv(obs_type="state", render_mode="rgb_array", visualization_width=SIDE, visualization_height=SIDE)
    corner = _centre(scene.block) - CENTRE  # the environment turns the T about its centre after it has been set down
    table.reset(options={"reset_to_state": [*scene.agent, *corner, scene.block[2]]})
    return table


def push(table: Any, actions: Array) -> tuple[Array, float, bool]:
    """Take a chunk of actions: the agent's path, the coverage at the end, and whether it was ever enough."""
    path, success, info = [table.get_obs()[:2]], False, {"coverage": 0.0}
    for target in path[0] + actions:
        seen, _, done, _, info = table.step(np.clip(target, 0, 512))
        path.append(seen[:2])
        success = success or bool(done)
    return np.stack(path), float(info["coverage"]), success


def _centre(pose: Any) -> Array:
    """Return where the centre of gravity of a T in some pose is."""
    return np.array(pose[:2], dtype=np.float64) + rotation(pose[2]) @ CENTRE
