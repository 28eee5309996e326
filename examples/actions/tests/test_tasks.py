"""What the tasks do, which weights and scenes are in the package, and what the package may import."""

import ast
import json
import math
import re
from pathlib import Path

import branchtree_actions
import numpy as np
import pytest
import torch
from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.pretrain import clone, demonstrations
from branchtree_actions.samples import TASKS, Trajectories
from branchtree_actions.unicycle import MARGIN, NEAR, RADIUS, STEP, Drive, Unicycle
from scipy.stats import kstest

import branchtree.plugins
import branchtree.testing
from branchtree import train
from branchtree.core.gaussian import DanceSde
from branchtree.core.noise import CorrelatedSiblings, NoiseSource
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import FixedSplits, Schedule
from branchtree.core.tree import grow
from branchtree.errors import DataError
from branchtree.plugins import Condition

PACKAGE = Path(branchtree_actions.__file__).parent
DRIVE = Drive(pose=(0, 0, 0), goal=(4, 0), obstacle=(2, 1))


def straight(turn: float = 0.0) -> np.ndarray:
    """Return a drive ahead at full speed of 1, turning in its first step."""
    actions = np.zeros((1, 16, 2))
    actions[..., 0], actions[0, 0, 1] = 1, turn / STEP
    return actions


def test_a_straight_drive_reaches_what_is_ahead() -> None:
    outcome = Unicycle().run([DRIVE], straight())
    assert outcome.paths.shape == (1, 17, 2) and outcome.paths[0, -1] == pytest.approx([4, 0])
    assert outcome.success.tolist() == [True] and outcome.values == pytest.approx([0])


def test_touching_the_obstacle_is_no_success_and_costs() -> None:
    blocked = DRIVE.model_copy(update={"obstacle": (2, RADIUS - 0.05)})
    outcome = Unicycle().run([blocked], straight())
    assert outcome.success.tolist() == [False] and outcome.values == pytest.approx([-2 * (MARGIN - RADIUS + 0.05)])


def test_a_drive_that_ends_elsewhere_is_paid_by_its_distance() -> None:
    outcome = Unicycle().run([DRIVE], straight(turn=math.pi / 8))
    end = 4 * np.array([math.cos(math.pi / 8), math.sin(math.pi / 8)])
    assert outcome.success.tolist() == [False] and np.hypot(*(end - [4, 0])) > NEAR
    clear = DRIVE.model_copy(update={"obstacle": (2, -3)})
    assert Unicycle().run([clear], straight(math.pi / 8)).values == pytest.approx([-np.hypot(*(end - [4, 0]))])


def test_what_is_seen_does_not_depend_on_where_the_unicycle_stands() -> None:
    angle, shift = 0.7, np.array([3.0, -1.0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = Drive(
        pose=(*shift, angle), goal=tuple(turn @ DRIVE.goal + shift), obstacle=tuple(turn @ DRIVE.obstacle + shift)
    )
    assert Unicycle().observe(moved) == pytest.approx(Unicycle().observe(DRIVE))


def test_drives_are_drawn() -> None:
    conditions = [Condition("", metadata=DRIVE.model_dump())] * 2
    samples = Trajectories(torch.from_numpy(np.concatenate([straight(), straight(0.5)])).float(), "unicycle")
    images = samples.show(conditions).pixels
    assert images.shape == (2, 3, 96, 96) and not torch.equal(images[0], images[1])
    assert float(images.min()) < 0.5 and float(images.max()) == 1


@pytest.mark.parametrize(("task_name", "unit"), [("unicycle", 1.0), ("pusht", 100.0)])
def test_latents_are_actions_over_their_scale(task_name: str, unit: float) -> None:
    policy = Policy(PolicyConfig(task=task_name))
    samples = policy.decode(torch.ones(3, *policy.latent_shape))
    assert samples.actions.shape == (3, 16, 2) and samples.actions.unique().tolist() == [unit]
    assert samples.modality == policy.modality == f"{task_name}_actions"
    assert 0.5 < float(demonstrations(policy.task, 50)[1].std()) < 2


def test_pusht_begins_where_the_scene_says() -> None:
    pytest.importorskip("gym_pusht")
    from branchtree_actions.pusht import environment

    rng = np.random.default_rng(1)
    for scene in (TASKS["pusht"].draw_scene(rng) for _ in range(5)):
        angle = scene.block[2] % math.tau
        assert environment(scene).get_obs() == pytest.approx([*scene.agent, *scene.block[:2], angle], abs=1e-6)


def test_a_push_from_behind_covers_more_of_the_mark() -> None:
    pytest.importorskip("gym_pusht")
    from branchtree_actions.pusht import MARK, Table

    task, way = TASKS["pusht"], np.array([math.cos(math.pi / 4), math.sin(math.pi / 4)])
    scene = Table(agent=tuple(MARK[:2] + 45 * way[::-1] * [-1, 1] - 140 * way), block=(*(MARK[:2] - 40 * way), MARK[2]))
    push = np.linspace(0, 100, 16)[:, None] * way
    outcome = task.run([scene, scene], np.stack([np.zeros((16, 2)), push]))
    assert 0 < outcome.values[0] < outcome.values[1]


@pytest.mark.parametrize("task_name", list(TASKS))
def test_scenes_are_valid_and_none_is_both_trained_on_and_held_out(task_name: str) -> None:
    files = [PACKAGE / "scenes" / f"{task_name}_{split}.jsonl" for split in ("train", "heldout")]
    splits = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    for row in [*splits[0], *splits[1]]:
        TASKS[task_name].read(Condition("", metadata={key: value for key, value in row.items() if key != "prompt"}))
    train_scenes, held_out = ({json.dumps(row) for row in rows} for rows in splits)
    assert (len(train_scenes), len(held_out)) == (512, 128) and not train_scenes & held_out


def test_a_wrong_scene_is_refused_with_its_file_and_line(tmp_path: Path) -> None:
    rows = (PACKAGE / "scenes" / "unicycle_train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "scenes.jsonl").write_text("\n".join([*rows, '{"prompt": "drive", "goal": [1, 2]}']), encoding="utf-8")
    with pytest.raises(DataError, match=r"scenes\.jsonl:3: 'drive': no scene of unicycle: pose: field required"):
        train("unicycle", {"data.prompts": str(tmp_path / "scenes.jsonl")}, output=tmp_path / "run")


def test_pretraining_lowers_the_error_of_its_demonstrations() -> None:
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(task="unicycle", width=32))
    policy.load(torch.device("cpu"), torch.float32, torch.float32)
    seen, actions = demonstrations(policy.task, 64)

    def error() -> float:
        noise = torch.randn(64, 16, 2, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            velocity = policy.predict(noise.lerp(actions, 0.5), torch.full((64,), 0.5), {"observation": seen})
        return float((velocity - (noise - actions)).square().mean())

    before = error()
    clone(policy, seen, actions, 200)
    assert error() < 0.8 * before


def test_children_follow_the_law_of_the_transition() -> None:
    """Kolmogorov-Smirnov on the noises of 2,048 children, 32 numbers each; a false alarm once in 10,000."""
    policy = Policy(PolicyConfig(task="unicycle", path=PACKAGE / "weights" / "unicycle"))
    policy.load(torch.device("cpu"), torch.float32, torch.float32)
    task, rng = policy.task, np.random.default_rng(2)
    scenes = [Condition("", metadata=task.draw_scene(rng).model_dump()) for _ in range(2048)]
    given = policy.encode(scenes)
    sampler = Sampler(DanceSde(0.8), CorrelatedSiblings(4.0), policy.sigmas(4))
    topology = grow([Schedule(4, FixedSplits((1,), (2,)), "splits").plan(0, prompt) for prompt in range(2048)])
    initial = torch.stack([policy.initial_noise(torch.Generator().manual_seed(row)) for row in range(2048)])

    def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return policy.predict(latents, sigma, {name: value[prompt] for name, value in given.items()})

    with torch.no_grad():
        tree = rollout(velocity, sampler, topology, initial, NoiseSource(3, 0), list(range(2048)))
        parents = tree.states[1]
        depth, active = torch.ones(2048, dtype=torch.long), torch.ones(2048, dtype=torch.bool)
        law = sampler.transition(parents, velocity(parents, sampler.sigmas[depth], torch.arange(2048)), depth, active)
    children = tree.states[2].unflatten(0, (2048, 2))
    noise = (children - law.mean[:, None]) / law.std[:, None]
    first = noise[:, 0].flatten()  # of each family one child: independent numbers
    assert kstest(first.double().numpy(), "norm").pvalue > 1e-4
    assert kstest((1.05 * first).double().numpy(), "norm").pvalue < 1e-4  # an error of 5% would be seen


def test_only_documented_names_are_imported() -> None:
    """From branchtree.plugins, branchtree.testing, or a module that a reference page documents."""
    public = {"branchtree": branchtree.__all__, "branchtree.plugins": branchtree.plugins.__all__}
    public |= {"branchtree.testing": branchtree.testing.__all__, "branchtree.errors": dir(branchtree.errors)}
    files = list(PACKAGE.rglob("*.py"))
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(r"branchtree(\.|$)", node.module or ""):
                found += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                assert not any(re.match(r"branchtree(\.|$)", alias.name) for alias in node.names)
    assert len(found) > 10
    assert [(module, name) for module, name in found if name not in public.get(module or "", [])] == []


def test_the_package_is_small() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py"))
    weights = sum(file.stat().st_size for file in PACKAGE.rglob("*.safetensors"))
    assert lines < 510 and weights < 1_000_000
