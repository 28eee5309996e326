"""PushT (gym-pusht): push a T onto its mark. A chunk of actions is 1.6 seconds; an episode is several chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from branchtree_actions.task import Array, Outcome, Point, Pose, Scene, Task

MARK = np.array([256, 256, math.pi / 4])  # where the T belongs
CENTRE = np.array([0, 45])  # the T's centre of gravity in its own frame
CLEAR = 110.0  # the distance from there at which the agent does not touch the T


class Table(Scene):
    """The agent's position and the T's pose, in pixels of 512 and radians, as gym-pusht observes them."""

    agent: Point
    block: Pose


class PushT(Task):
    """Actions are targets of the agent, relative to where it is when the chunk begins. The return is the coverage."""

    name = "pusht"
    prompt = "push the T onto its mark"
    scene = Table
    horizon = 16
    observation_size = 6
    action_scale = 100.0

    def draw_scene(self, rng: np.random.Generator) -> Table:
        """The T up to 100 pixels and 0.5 radians away from its mark, and the agent clear of it."""
        shift, angle = rng.uniform(20, 100), rng.uniform(-math.pi, math.pi)
        block = MARK + [shift * math.cos(angle), shift * math.sin(angle), rng.uniform(-0.5, 0.5)]
        while True:
            agent = rng.uniform(60, 450, 2)
            if np.hypot(*(agent - _centre(block))) > CLEAR:
                return Table(agent=agent.round(1).tolist(), block=block.round(3).tolist())

    def observe(self, scene: Table) -> Array:
        """The agent and the T relative to the mark, and the T's angle."""
        turn = scene.block[2] - MARK[2]
        places = np.concatenate([scene.agent, scene.block[:2]]) - np.tile(MARK[:2], 2)
        return np.concatenate([places / 100, [math.sin(turn), math.cos(turn)]])

    def demonstrate(self, scene: Table, rng: np.random.Generator) -> Array:
        """The better of two pushes towards the mark, each with errors of aim, offset and length."""
        tries = np.stack([self._try(scene, rng) for _ in range(2)])
        best: Array = tries[self.run([scene] * 2, tries).values.argmax()]
        return best

    def _try(self, scene: Table, rng: np.random.Generator) -> Array:
        """Go around the T, and push it the way it has to go; its angle is ignored."""
        agent, centre = np.array(scene.agent), _centre(scene.block)
        way = _centre(MARK) - centre + rng.normal(0, 12, 2)
        length = max(np.hypot(*way), 1e-6)
        way, side = way / length, np.array([-way[1], way[0]]) / length
        start = centre - CLEAR * way + rng.normal(0, 20) * side
        around = centre + math.copysign(1.2 * CLEAR, (agent - centre) @ side) * side
        points = [agent, around, start] if (agent - centre) @ way > -CLEAR / 2 else [agent, start, start]
        end = start + (CLEAR - 45 + length * rng.uniform(0.3, 1.1)) * way
        times = np.arange(1, self.horizon + 1)
        targets = [np.interp(times, [0, 4, 8, self.horizon], axis) for axis in np.array([*points, end]).T]
        return np.stack(targets, axis=1) + rng.normal(0, 2, (self.horizon, 2)) - agent

    def run(self, scenes: Sequence[Table], actions: Array) -> Outcome:
        """Take each chunk in an environment that is reset to its scene."""
        runs = [_push(environment(scene), chunk) for scene, chunk in zip(scenes, actions, strict=True)]
        paths, values, success = zip(*runs, strict=True)
        return Outcome(np.stack(paths), np.array(values), np.array(success))

    def picture(self, scene: Table, actions: Array) -> Image.Image:
        """The environment's own picture of how the chunk ends."""
        table = environment(scene)
        _push(table, actions)
        return Image.fromarray(table.render())


def environment(scene: Table) -> Any:
    """Return gym-pusht's environment, reset so that its observation is the scene."""
    from gym_pusht.envs.pusht import PushTEnv

    table = PushTEnv(obs_type="state", render_mode="rgb_array", visualization_width=96, visualization_height=96)
    # The environment turns the T about its centre after it has set its position.
    corner = _centre(scene.block) - CENTRE
    table.reset(options={"reset_to_state": [*scene.agent, *corner, scene.block[2]]})
    return table


def observed(table: Any) -> Table:
    """Return the scene that an environment is in."""
    numbers = table.get_obs().tolist()
    return Table(agent=numbers[:2], block=numbers[2:])


def _push(table: Any, actions: Array) -> tuple[Array, float, bool]:
    """Take a chunk of actions: the agent's path, the coverage at the end, and whether it was ever enough."""
    path = [table.get_obs()[:2]]
    success, info = False, {"coverage": 0.0}
    for target in path[0] + actions:
        seen, _, done, _, info = table.step(np.clip(target, 0, 512))
        path.append(seen[:2])
        success = success or done
    return np.stack(path), float(info["coverage"]), success


def _centre(pose: Any) -> Array:
    """Return where the centre of gravity of a T in some pose is."""
    x, y, angle = pose
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.array([x, y]) + turn @ CENTRE
