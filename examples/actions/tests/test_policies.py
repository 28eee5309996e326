"""The policies and their rewards keep the promises that branchtree relies on."""

import importlib.util
from pathlib import Path

import branchtree_actions
import numpy as np
import pytest
import torch
from branchtree_actions.samples import TASKS, Trajectories

from branchtree.plugins import Condition, Samples
from branchtree.testing import AdapterCase, ModelAdapterPromises, RewardCase, RewardPromises, TrainingPromises

PACKAGE = Path(branchtree_actions.__file__).parent
NEEDS = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None, reason="needs gym-pusht")
REWARDS = {"unicycle": "reach", "pusht": "pusht"}
TASK_NAMES = ["unicycle", pytest.param("pusht", marks=NEEDS)]
INCOMPLETE = {"unicycle": {"pose": [0, 0], "goal": [1, 1], "obstacle": [2, 2]}, "pusht": {"agent": [1, 1]}}


@pytest.fixture(scope="module", params=TASK_NAMES)
def task_name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestPolicy(ModelAdapterPromises, TrainingPromises):
    """Rows, ratios, resumption and all else, of both policies."""

    @pytest.fixture(scope="module")
    @classmethod
    def case(cls, task_name: str, tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
        lines = (PACKAGE / "scenes" / f"{task_name}_train.jsonl").read_text(encoding="utf-8").splitlines()
        scenes = tmp_path_factory.mktemp(task_name) / "scenes.jsonl"
        scenes.write_text("\n".join(lines[1:4]), encoding="utf-8")  # no chunk of the first weights misses these Ts
        return AdapterCase(
            model={"adapter": "actions", "task": task_name, "path": str(PACKAGE / "weights" / task_name)},
            reward={"reward": REWARDS[task_name]},
            prompts=str(scenes),
            refused=[Condition("no scene"), Condition("half of one", metadata=INCOMPLETE[task_name])],
        )


class TestReward(RewardPromises):
    """Scores that depend on a chunk of actions and its scene alone."""

    @pytest.fixture(scope="module")
    @classmethod
    def case(cls, task_name: str) -> RewardCase:
        task, rng = TASKS[task_name], np.random.default_rng(0)
        scenes = [task.draw_scene(rng) for _ in range(4)]
        actions = torch.from_numpy(np.stack([task.demonstrate(scene, rng) for scene in scenes])).float()

        def media(modality: str, samples: int) -> Samples:
            assert modality == f"{task_name}_actions"
            return Trajectories(actions[:samples], task_name)

        conditions = [Condition(task.prompt, metadata=scene.model_dump()) for scene in scenes]
        return RewardCase(reward={"reward": REWARDS[task_name]}, conditions=conditions, media=media)
