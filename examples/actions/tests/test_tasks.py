"""What the tasks do, which weights and scenes are in the package, and what their pictures show."""

import json
import math
from pathlib import Path

import branchtree_actions
import numpy as np
import pytest
import torch
from branchtree_actions.policy import Policy, PolicyConfig
from branchtree_actions.pretrain import clone, demonstrations
from branchtree_actions.rewards import OutcomeConfig, OutcomeReward
from branchtree_actions.samples import TASKS, Trajectories
from branchtree_actions.task import rotation
from branchtree_actions.unicycle import MARGIN, NEAR, RADIUS, STEP, Drive, Unicycle
from scipy.stats import kstest

from branchtree import train
from branchtree.core.gaussian import DanceSde
from branchtree.core.noise import CorrelatedSiblings, IndependentSiblings, NoiseSource, SimplexSiblings
from branchtree.core.rollout import Sampler, rollout
from branchtree.core.schedule import FixedSplits, Schedule
from branchtree.core.tree import grow
from branchtree.errors import DataError, RewardError
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
    """A blue path to the goal, and a red one beside it; each begins at the black disc."""
    conditions = [Condition("", metadata=DRIVE.model_dump())] * 2
    samples = Trajectories(torch.from_numpy(np.concatenate([straight(), straight(0.5)])).float(), "unicycle")
    images = samples.show(conditions).pixels
    assert images.shape == (2, 3, 192, 192) and float(images.max()) == 1
    red, green, blue = images.unbind(1)
    paths = ((blue > 0.8) & (red < 0.4)), ((red > 0.8) & (green < 0.2))
    assert [bool(path[0].any()) for path in paths] == [True, False]
    assert [bool(path[1].any()) for path in paths] == [False, True]
    columns = [torch.nonzero(path[row].any(0)).flatten() for row, path in enumerate(paths)]
    assert all(int(column.max() - column.min()) > 90 for column in columns)  # of 192, nearly all of the way
    assert bool((images.amax(1) < 0.1).flatten(1).any(1).all())


def test_pushes_are_drawn() -> None:
    """The agent's path in black, from where it stood, and the T as it lay in orange."""
    pytest.importorskip("gym_pusht")
    task, rng = TASKS["pusht"], np.random.default_rng(0)
    scene = task.scene(agent=(150, 350), block=(240, 240, 1))
    chunk = torch.from_numpy(task.demonstrate(scene, rng)[None]).float()
    (image,) = Trajectories(chunk, "pusht").show([Condition("", metadata=scene.model_dump())]).pixels
    black, orange = image.amax(0) < 0.1, (image[0] > 0.9) & (image[1] > 0.4) & (image[1] < 0.7) & (image[2] < 0.1)
    rows, columns = torch.nonzero(black).T
    x, y = np.array(scene.agent) * 288 / 512 - 48
    assert float(torch.hypot(columns - x, rows - y).min()) < 4 and len(rows) > 100
    corners = np.array(scene.block[:2]) + 30 * np.array([(-2, 0), (2, 0), (0.5, 4)]) @ rotation(scene.block[2]).T
    near = [torch.nonzero(orange).flip(1) - torch.from_numpy(corner * 288 / 512 - 48) for corner in corners]
    assert all(float(each.norm(dim=1).min()) < 4 for each in near)


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


def test_a_missing_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TASKS["pusht"]), "needs", "gym-nowhere")
    with pytest.raises(RewardError, match="gym-nowhere is not installed; install it by: pip install gym-nowhere"):
        OutcomeReward("pusht", OutcomeConfig()).load(torch.device("cpu"))


@pytest.mark.parametrize("task_name", list(TASKS))
def test_scenes_are_valid_and_none_is_both_trained_on_and_held_out(task_name: str) -> None:
    files = [PACKAGE / "scenes" / f"{task_name}_{split}.jsonl" for split in ("train", "heldout")]
    splits = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    for row in [*splits[0], *splits[1]]:
        Condition("", metadata={k: v for k, v in row.items() if k != "prompt"}).read(TASKS[task_name].scene)
    train_scenes, held_out = ({json.dumps(row) for row in rows} for rows in splits)
    assert (len(train_scenes), len(held_out)) == (512, 128) and not train_scenes & held_out


def test_a_wrong_scene_is_refused_with_its_file_and_line(tmp_path: Path) -> None:
    rows = (PACKAGE / "scenes" / "unicycle_train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "scenes.jsonl").write_text("\n".join([*rows, '{"prompt": "drive", "goal": [1, 2]}']), encoding="utf-8")
    with pytest.raises(DataError, match=r"scenes\.jsonl:3: 'drive': pose: Field required"):
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


@pytest.mark.parametrize("siblings", [IndependentSiblings(), CorrelatedSiblings(4.0), SimplexSiblings()])
def test_children_follow_the_law_of_the_transition(siblings: IndependentSiblings) -> None:
    """Kolmogorov-Smirnov on the noises of 2,048 first and last children, 32 numbers each; a false alarm in 10,000."""
    policy = Policy(PolicyConfig(task="unicycle", path=PACKAGE / "weights" / "unicycle"))
    policy.load(torch.device("cpu"), torch.float32, torch.float32)
    task, rng = policy.task, np.random.default_rng(2)
    scenes = [Condition("", metadata=task.draw_scene(rng).model_dump()) for _ in range(2048)]
    given = policy.encode(scenes)
    sampler = Sampler(DanceSde(0.8), siblings, policy.sigmas(4))
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
    for child in (0, 1):  # of each family one at a time: independent numbers
        numbers = noise[:, child].flatten().double().numpy()
        assert kstest(numbers, "norm").pvalue > 1e-4
        assert kstest(1.05 * numbers, "norm").pvalue < 1e-4  # an error of 5% would be seen


def test_the_package_is_small() -> None:
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py"))
    weights = sum(file.stat().st_size for file in PACKAGE.rglob("*.safetensors"))
    assert lines < 500 and weights < 1_000_000
