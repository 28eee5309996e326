"""Samples of any kind: how a kind behaves, and a stranger's kind that is trained, scored and drawn like images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from guests import fake_distribution
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import Tensor
from training_runs import metrics

from branchtree import evaluate, load_recipe, train
from branchtree.errors import DataError, RecipeError
from branchtree.plugins import Callback, Condition, Media, Samples
from branchtree.recipe.build import make_model


@dataclass(frozen=True)
class Paths(Samples):
    """A few numbers and a name for each sample, and what holds for all."""

    points: Tensor
    names: tuple[str, ...]
    rate: float = 2.0
    modality = "path"


PATHS = Paths(torch.arange(10.0).view(5, 2), ("a", "b", "c", "d", "e"), 4.0)


def test_samples_are_cut_and_concatenated_in_all_their_fields() -> None:
    pieces = [PATHS[:2], PATHS[2:3], PATHS[3:]]
    assert [len(each) for each in pieces] == [2, 1, 2] and pieces[1].names == ("c",)
    whole = Paths.concatenate(pieces)
    assert torch.equal(whole.points, PATHS.points) and (whole.names, whole.rate) == (PATHS.names, 4.0)


def test_a_copy_of_samples_keeps_nothing_of_their_batch() -> None:
    copy = PATHS[1:2].cpu()
    assert copy.points.untyped_storage().nbytes() == 2 * 4 < PATHS[1:2].points.untyped_storage().nbytes()
    assert copy.names == ("b",) and copy.show([]) is None


def test_samples_that_are_not_finite_are_told_from_the_others() -> None:
    points = PATHS.points.clone()
    points[1, 0], points[4, 1] = torch.nan, torch.inf
    assert Paths(points, PATHS.names).is_finite().tolist() == [True, False, True, True, False]
    assert Media(images=torch.zeros(2, 3, 4, 4)).is_finite().tolist() == [True, True]


def test_a_conditions_metadata_are_read_as_a_plug_ins_own_model() -> None:
    class Goal(BaseModel, extra="forbid"):
        goal: tuple[float, float]
        radius: float = Field(default=1.0, gt=0)

    assert Condition("go", metadata={"goal": [1, 2]}).read(Goal) == Goal(goal=(1, 2))
    wrong = Condition("go", metadata={"goal": [1], "radius": -1, "speed": 2}, location="goals.jsonl:3")
    with pytest.raises(DataError, match=r"goals\.jsonl:3: 'go': goal\.1: .*; radius: .* 0; speed: Extra"):
        wrong.read(Goal)


STRANGER = """
    from dataclasses import dataclass

    import torch
    from pydantic import BaseModel
    from torch import Tensor, nn

    from branchtree.plugins import Media, ModelBase, Samples, Scores, hookimpl


    class Config(BaseModel, extra="forbid"):
        path: str | None = None
        drawn: bool = False


    @dataclass(frozen=True)
    class Walks(Samples):
        points: Tensor
        drawn: bool
        modality = "walk"

        def show(self, conditions):
            goals = torch.tensor([condition.metadata["goal"] for condition in conditions])
            pixels = goals.view(-1, 1, 2, 1).expand(-1, 3, 2, 8)
            return Media(images=pixels.float()) if self.drawn else None


    class Walker(ModelBase):
        modality = "walk"
        latent_shape = (4, 2)

        def build_denoiser(self):
            return nn.Sequential(nn.Linear(11, 16), nn.Tanh(), nn.Linear(16, 8))

        def encode(self, conditions):
            return {"goal": torch.tensor([condition.metadata["goal"] for condition in conditions])}

        def predict(self, latents, sigma, conditioning, denoiser=None):
            given = torch.cat([latents.flatten(1), conditioning["goal"], sigma[:, None]], 1)
            return (denoiser or self.denoiser)(given).view_as(latents)

        def decode(self, latents):
            return Walks(latents.cumsum(1), self.config.drawn)


    class Arrives:
        modalities = frozenset({"walk"})

        def __init__(self, config):
            pass

        def load(self, device):
            pass

        def score(self, media, conditions):
            goals = torch.tensor([condition.metadata["goal"] for condition in conditions])
            distance = (media.points[:, -1] - goals).square().sum(1)
            return Scores(-distance, torch.ones(len(distance), dtype=torch.bool))


    @hookimpl
    def register_models(register):
        register("walker", build=Walker, config=Config, summary="walks to a goal")


    @hookimpl
    def register_rewards(register):
        register("arrives", build=Arrives, config=Config, summary="how near the goal a walk ends")
"""


@pytest.fixture
def recipe(tmp_path: Path, plug: Callable[[Path], None]) -> Path:
    """A recipe of the stranger's: prompts that differ by their goals alone."""
    plug(fake_distribution(tmp_path, "acme-walks", {"acme": "acme_walks"}, {"acme_walks": STRANGER}))
    rows = [{"prompt": "go", "goal": [0.5 * i, 1.0]} for i in range(3)]
    (tmp_path / "goals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "walk.yaml"
    path.write_text(
        "model: {adapter: walker}\n"
        "rewards: [{reward: arrives}]\n"
        "tree: {steps: 4, splits: [0, 1]}\n"
        "batch: {prompts: 2}\n"
        "data: {prompts: goals.jsonl}\n"
        "evaluation: {prompts: goals.jsonl, rewards: [{reward: arrives}]}\n"
        "run: {iterations: 2, sample_prompts: 3}\n"
    )
    return path


def test_another_kind_of_sample_is_trained_and_evaluated(recipe: Path, tmp_path: Path) -> None:
    """Without pictures: its trees are recorded all the same, and its figures are of distinct goals."""

    class Seen(Callback):
        kinds: ClassVar[list[tuple[str, int]]] = []

        def on_samples(self, iteration: int, samples: Sequence[Samples], conditions: Sequence[Condition]) -> None:
            self.kinds.append((samples[0].modality, sum(map(len, samples))))

    train(recipe, output=tmp_path / "run", callbacks=[Seen()])
    assert all(row["ratio/first_step_max_deviation"] == 0 for row in metrics(tmp_path / "run"))
    assert not list((tmp_path / "run" / "samples").glob("*.png"))
    kept = load_file(tmp_path / "run" / "samples" / "iteration_000002.safetensors")
    assert kept["points"].shape == (3, 4, 2) and kept.keys() == {"points"}
    tree = json.loads((tmp_path / "run" / "trees" / "iteration_000000.json").read_text())
    assert len(tree["leaves"]) == 4 and {leaf["thumbnail"] for leaf in tree["leaves"]} == {None}
    assert Seen.kinds == [("walk", 3)] * 2
    evaluate(tmp_path / "run", output=tmp_path / "evaluation")
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "samples.jsonl").read_text().splitlines()]
    base = [row["rewards"]["arrives"]["value"] for row in rows if row["model"] == "base"]
    assert len(base) == len(set(base)) == 3


def test_another_kind_of_sample_is_drawn_as_it_says(recipe: Path, tmp_path: Path) -> None:
    """Under its conditions, in grids, trees and the report."""
    from branchtree import write_report

    train(recipe, {"model.drawn": True}, output=tmp_path / "run")
    index = json.loads((tmp_path / "run" / "samples" / "iteration_000002.json").read_text())
    assert index["prompts"] == ["go"] * 3
    assert len(list((tmp_path / "run" / "trees" / "iteration_000000").glob("leaf_*.png"))) == 4
    page = write_report(tmp_path / "run").read_text()
    assert "After 2 iterations" in page and page.count("data:image/png") >= 2


@pytest.mark.parametrize("changes", [{"run.sample_every": None, "run.tree_every": None}])
def test_pictures_can_be_left_out(recipe: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(recipe, {"model.drawn": True, **changes}, output=tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists() and not (tmp_path / "run" / "trees").exists()


def test_a_reward_of_another_kind_is_refused(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"digits.*image.*walk"):
        train(load_recipe(recipe, {"rewards": [{"reward": "digits"}]}))


def test_weights_that_no_file_has_are_the_same_in_every_process(recipe: Path) -> None:
    """Whatever torch's global random state, which is left as it was."""
    first, second = (load_fresh(recipe, seed) for seed in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items()) and len(first) == 4


def load_fresh(recipe: Path, seed: int) -> dict[str, Tensor]:
    model = make_model(load_recipe(recipe))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model.load(torch.device("cpu"), torch.float32, torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
    return model.denoiser.state_dict()
