"""``branchtree diversity``: which samples it draws, what it keeps, and what it says."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from branchtree.cli.app import app
from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.errors import BranchTreeError, RecipeError, RewardError
from branchtree.plugins import Condition
from branchtree.recipe.build import make_model
from branchtree.recipe.schema import LoraSection
from branchtree.run.directory import RunDirectory
from branchtree.run.manifest import write_manifest
from branchtree.studies.diversity import run as study_module
from branchtree.studies.diversity.cache import FeatureCache, describe, weights_digest
from branchtree.studies.diversity.request import (
    DiversityChoices,
    DiversityRequest,
    grid_cells,
    make_diversity_request,
)
from branchtree.studies.diversity.run import load_policy, run_study
from branchtree.studies.diversity.sampling import (
    BRANCHED,
    CONTROL,
    INDEPENDENT,
    PLAIN,
    FeatureSamples,
    Kind,
    PlannedSet,
    draw_samples,
)
from branchtree.training.loading import load_model
from branchtree.training.policy import Policy

SMALL = {"tree.steps": 4, "tree.splits": [0, 1], "batch.rollout_prompts": 3, "batch.decode_rows": 5}
WORDS = ["tree.steps=4", "tree.splits=[0,1]"]


def request(output: Path, **choices: Any) -> DiversityRequest:
    return make_diversity_request("quickstart", SMALL, DiversityChoices(samples=16, output=output, **choices))


Small = tuple[DiversityRequest, Policy]


@pytest.fixture
def small(tmp_path: Path) -> tuple[DiversityRequest, Policy]:
    """Four groups of four, of two prompts, and the loaded model."""
    asked = request(tmp_path)
    return asked, load_policy(asked)


def drawn(policy: Policy, asked: DiversityRequest, kind: Kind) -> FeatureSamples:
    return draw_samples(policy, planned(asked, kind), asked.spaces)


def planned(asked: DiversityRequest, kind: Kind) -> PlannedSet:
    return PlannedSet(kind.name, kind, asked.recipe, asked.layout)


def test_groups_are_whole_and_every_prompt_has_two(tmp_path: Path) -> None:
    layout = request(tmp_path).layout
    assert (layout.groups, layout.size, layout.samples, len(layout.conditions)) == (4, 4, 16, 2)
    assert layout.prompt.tolist() == [0, 1, 0, 1]
    larger = make_diversity_request("quickstart", SMALL, DiversityChoices(samples=4 * 137 + 1, output=tmp_path)).layout
    assert (larger.groups, len(larger.conditions)) == (138, 60)  # rounded up, and all prompts of the file
    assert sorted(torch.bincount(larger.prompt).unique().tolist()) == [2, 3]


def reference_trajectory(policy: Policy, asked: DiversityRequest, group: int, place: int, own: bool) -> Tensor:
    """One plain trajectory by the equations of DanceGRPO's SDE, step by step."""
    seed, set_number, row = asked.layout.seed, 3 if own else 1, group * 4 + place
    start = generator(seed, set_number, group, 0, place if own else 0, Purpose.INITIAL)
    x = policy.model.initial_noise(start)[None]
    conditioning = policy.cache.get([asked.layout.conditions[group % 2]], torch.device("cpu"))
    sigmas = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        velocity = policy.model.predict(x, torch.tensor([sigma]), conditioning)
        change, eta = following - sigma, 0.7 if step < 3 else 0.0
        score = -(x + (1 - sigma) * velocity) / sigma
        noise = NoiseSource(seed, set_number).normal(Purpose.EDGE, row, step + 1, [0], x.shape[1:])
        x = x + (velocity - eta**2 / 2 * score) * change + eta * (-change) ** 0.5 * noise
    return x


@torch.no_grad()
@pytest.mark.parametrize("kind", [PLAIN, INDEPENDENT])
def test_plain_samples_are_independent_trajectories(small: Small, kind: Kind) -> None:
    asked, policy = small
    found = drawn(policy, asked, kind)
    latents = torch.cat(
        [reference_trajectory(policy, asked, *divmod(row, 4), own=kind is INDEPENDENT) for row in range(16)]
    )
    expected = torch.cat([asked.spaces[0].space.features(policy.model.decode(part)) for part in latents.split(4)])
    torch.testing.assert_close(found.features["pixels"], expected, rtol=1e-3, atol=1e-4)
    flat = latents.flatten(1).double()
    pairs = [(flat[i] - flat[j]).square().mean().sqrt() for i in range(4) for j in range(i)]
    assert float(found.latent_distance[0]) == pytest.approx(float(sum(pairs) / 6), rel=1e-4)


def test_branched_samples_share_their_steps_and_cost_what_a_tree_costs(
    small: Small,
) -> None:
    asked, policy = small
    rows: list[int] = []
    handle = policy.model.denoiser.register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    for kind, expected in ((BRANCHED, 4 * (1 + 2 + 4 + 4)), (PLAIN, 16 * 4)):
        rows.clear()
        drawn(policy, asked, kind)
        assert sum(rows) == expected
    handle.remove()


def test_no_two_sets_share_noise_and_a_set_does_not_depend_on_batches(
    small: Small,
) -> None:
    asked, policy = small
    sets = {kind.name: drawn(policy, asked, kind).features["pixels"] for kind in (BRANCHED, PLAIN, CONTROL)}
    alike = [torch.isclose(sets[a], sets[b]).all(dim=1).any() for a, b in (("branched", "plain"), ("plain", "control"))]
    assert not any(map(bool, alike))
    batch = asked.recipe.batch.model_copy(update={"rollout_prompts": 1, "decode_rows": 16, "rollout_rows": 3})
    other = replace(planned(asked, BRANCHED), recipe=asked.recipe.model_copy(update={"batch": batch}))
    again = draw_samples(policy, other, asked.spaces).features["pixels"]
    torch.testing.assert_close(again, sets["branched"], rtol=1e-3, atol=1e-4)


def test_broken_features_are_refused(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, policy = small
    space = asked.spaces[0].space
    monkeypatch.setattr(space, "features", lambda media: torch.full((len(media), 2), torch.nan))
    with pytest.raises(RewardError, match="'pixels' of some samples are not finite"):
        drawn(policy, asked, PLAIN)


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    words = ["diversity", "quickstart", *WORDS, "--samples", "16", "-f", "pixels size=4", "-f", "digits"]
    words += ["--grid", "tree.strength=1,8", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0
    for text in ("16 samples a set, 4 groups of 4, 2 prompts", "groups apart", "control, plain", "strength=8"):
        assert text in result.output, text
    written = json.loads((tmp_path / "diversity.json").read_text())
    assert list(written["sets"]) == ["branched", "plain", "control", "independent"]
    assert set(written["features"]) == {"pixels size=4", "digits"}
    assert "held" in written["features"]["digits"]
    kinds = {(one["features"], one["kernel"], one["first"]) for one in written["discrepancies"]}
    assert len(kinds) == len(written["discrepancies"]) == 2 * 2 * 2
    rows = {row["name"]: row["spreads"] for row in written["within_group_distance"]}
    assert list(rows) == [
        "branched",
        "plain",
        "control",
        "independent",
        "tree.strength=1",
        "tree.strength=8",
    ]
    assert all(set(spreads) == {"latents", "pixels size=4", "digits"} for spreads in rows.values())
    # Samples that start from one noise are more alike than those that do not.
    assert rows["plain"]["latents"]["mean"] < rows["independent"]["latents"]["mean"]
    assert rows["tree.strength=1"]["latents"] != rows["tree.strength=8"]["latents"]


def test_what_is_kept_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(policy: Policy, planned: PlannedSet, *rest: Any) -> FeatureSamples:
        calls.append(planned.kind.name)
        return draw_samples(policy, planned, *rest)

    monkeypatch.setattr(study_module, "draw_samples", counting)
    first = run_study(request(tmp_path))
    assert calls == ["branched", "plain", "control", "independent"]
    assert not list(tmp_path.rglob("*.partial"))
    calls.clear()
    second = run_study(request(tmp_path))
    assert calls == []
    assert (second.discrepancies, second.groups) == (first.discrepancies, first.groups)
    run_study(request(tmp_path, grid=("tree.strength=4,1",)))
    assert calls == ["branched"]  # strength 4 is what the recipe has
    calls.clear()
    run_study(request(tmp_path, features=("pixels size=2",)))
    assert calls == ["branched", "plain", "control", "independent"]


def test_what_samples_depend_on_is_in_their_description(small: Small, tmp_path: Path) -> None:
    asked, policy = small
    weights = weights_digest(policy.model.denoiser)
    image = tmp_path / "first.png"
    image.write_bytes(b"one")
    layout = replace(asked.layout, conditions=[Condition("a", image=image)])

    def described(recipe: Any = asked.recipe, kind: Kind = PLAIN, layout: Any = layout, weights: str = weights) -> str:
        return json.dumps(describe(PlannedSet(kind.name, kind, recipe, layout), weights))

    tree = asked.recipe.tree.model_copy(update={"strength": 2.0})
    found = {
        described(),
        described(asked.recipe.model_copy(update={"tree": tree})),
        described(asked.recipe.model_copy(update={"lora": LoraSection(rank=4)})),
        described(kind=CONTROL),
        described(kind=replace(PLAIN, shared=False)),
        described(layout=replace(layout, seed=1)),
        described(layout=replace(layout, iteration=1)),
        described(weights="other"),
    }
    image.write_bytes(b"two")
    found.add(described())
    assert len(found) == 9
    with torch.no_grad():
        next(policy.model.denoiser.parameters())[0] += 1
    assert weights_digest(policy.model.denoiser) != weights


def test_a_damaged_cache_is_drawn_again(small: Small, tmp_path: Path) -> None:
    asked, policy = small
    cache, described = FeatureCache(tmp_path / "kept"), {"a": 1}
    samples = drawn(policy, asked, PLAIN)
    assert cache.read(described, asked.spaces) is None
    cache.write(described, asked.spaces, samples)
    found = cache.read(described, asked.spaces)
    assert found is not None
    assert torch.equal(found.features["pixels"], samples.features["pixels"])
    assert torch.equal(found.latent_distance, samples.latent_distance)
    next((tmp_path / "kept").iterdir()).write_bytes(b"half")
    assert cache.read(described, asked.spaces) is None


def test_a_runs_newest_checkpoint_is_sampled(tmp_path: Path) -> None:
    asked = request(tmp_path)
    run = RunDirectory(tmp_path / "run")
    run.claim(resume=False)
    run.write_recipe(asked.recipe)
    model = make_model(asked.recipe)
    load_model(asked.recipe, model, torch.device("cpu"))
    digests = []
    for iteration in (2, 5):
        with torch.no_grad():
            next(model.denoiser.parameters()).mul_(1.1)
        folder = run.checkpoints / f"iteration_{iteration:06d}"
        model.save(folder / "model")
        (folder / "state.json").write_text(json.dumps({"iteration": iteration, "recipe": {"optim": {}}}))
        write_manifest(folder)
        digests.append(weights_digest(model.denoiser))
    judged = make_diversity_request(run.root, {}, DiversityChoices(samples=16))
    assert judged.output == run.root / "diversity"
    assert judged.layout.iteration == 5
    assert weights_digest(load_policy(judged).model.denoiser) == digests[1] != digests[0]


def test_a_grid_is_all_combinations() -> None:
    found = grid_cells(["tree.strength=1,2", "tree.splits=[0,3],dense"])
    assert found == [
        {"tree.strength": strength, "tree.splits": splits} for strength in (1, 2) for splits in ([0, 3], "dense")
    ]
    assert grid_cells(["tree.window={size: 2, every: 5},null"]) == [
        {"tree.window": {"size": 2, "every": 5}},
        {"tree.window": None},
    ]
    assert grid_cells([]) == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"samples": 4}, "at least 2 trees, 8 samples"),
        ({"grid": ("tree.strength",)}, "write it as key=value,value"),
        ({"grid": ("optim.lr=1,2",)}, "only keys of tree and sampler"),
        ({"grid": ("tree.strenth=1",)}, "did you mean 'strength'"),
        ({"grid": ("sampler.kind=ddim",)}, "does not suit a model that predicts velocity"),
        ({"prompts": Path("nowhere.txt")}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_loaded(
    tmp_path: Path, choices: dict[str, Any], message: str
) -> None:
    given = {"samples": 16, "output": tmp_path, **choices}
    with pytest.raises(BranchTreeError, match=message) as caught:
        make_diversity_request("quickstart", SMALL, DiversityChoices(**given))
    assert isinstance(caught.value, RecipeError) or "prompts" in choices
