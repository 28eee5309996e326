"""Rules of the method that come from outside: each is registered by a stranger's package and trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import fake_distribution
from training_runs import metrics

from branchtree import load_recipe, plan, train
from branchtree.errors import PluginError, RecipeError
from branchtree.plugins.registry import RULES, registry
from branchtree.recipe.build import make_kernel, make_prune, make_schedule, make_siblings

RULES_OF_A_STRANGER = """
    from dataclasses import dataclass, replace

    import torch
    from pydantic import BaseModel

    from branchtree.core.advantages import depth_advantages
    from branchtree.core.noise import Purpose
    from branchtree.core.pruning import trainable_edges
    from branchtree.core.schedule import FixedSplits
    from branchtree.core.gaussian import DanceSde
    from branchtree.plugins import hookimpl


    class Scale(BaseModel, extra="forbid"):
        factor: float = 1.0


    @dataclass(frozen=True)
    class Laplace:
        mean: torch.Tensor
        scale: torch.Tensor

        def sample(self, noise):
            return self.mean if noise is None else self.mean + self.scale * noise

        def _average(self, values):
            random = self.scale.flatten() > 0
            return torch.where(random, values.flatten(1).mean(1), 0.0)

        @property
        def _safe(self):
            return torch.where(self.scale > 0, self.scale, 1.0)

        def log_prob(self, following, reduction):
            return self._average(-(following - self.mean).abs() / self._safe - (2 * self._safe).log())

        def kl(self, reference, reduction):
            distance = (self.mean - reference.mean).abs() / self._safe
            return self._average((-distance).exp() + distance - 1)

        def rows(self, index):
            return Laplace(self.mean[index], self.scale[index])


    @dataclass(frozen=True)
    class LaplaceStep:
        scale: float

        def __call__(self, latents, prediction, sigma, sigma_next, active):
            def like(rows):
                return rows.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))

            return Laplace(latents + prediction * like(sigma_next - sigma), self.scale * like(active))


    class LaplaceSiblings:
        def draw(self, source, prompt, depth, parents, branches, shape):
            children = range(parents.start * branches, parents.stop * branches)
            normal = source.normal(Purpose.EDGE, prompt, depth, children, shape)
            return -normal.sign() * torch.special.erfc(normal.abs() / 2**0.5).log()


    class Half:
        def draw(self, source, prompt, depth, parents, branches, shape):
            children = range(parents.start * branches, parents.stop * branches)
            own = source.normal(Purpose.EDGE, prompt, depth, children, shape)
            if branches == 1:
                return own
            own = own.view(len(parents), branches, *shape)
            mean = own.mean(dim=1, keepdim=True)
            return ((own - mean) * (branches / (branches - 1)) ** 0.5).flatten(0, 1)


    @hookimpl
    def register_transitions(register):
        def build(config, section, prediction):
            return DanceSde(config.factor * section.eta)

        def laplace(config, section, prediction):
            return LaplaceStep(config.factor * section.eta)

        register("scaled", build=build, config=Scale, summary="dance, scaled")
        register("laplace", build=laplace, config=Scale, summary="Laplace noise")


    @hookimpl
    def register_siblings(register):
        register("laplace", build=lambda config, section: LaplaceSiblings(), config=Scale, summary="Laplace noise")
        register("opposite", build=lambda config, section: Half(), config=Scale, summary="mirror images")


    @hookimpl
    def register_splits(register):
        def build(config, section, seed):
            return FixedSplits((1,), (3,))

        register("second", build=build, config=Scale, summary="three children after the second step")


    @hookimpl
    def register_estimators(register):
        def build(config, section):
            def signs(topology, values, eps):
                return tuple(level.sign() * config.factor for level in depth_advantages(topology, values, eps))

            return signs

        register("signs", build=build, config=Scale, summary="the sign alone")


    @hookimpl
    def register_pruning(register):
        def build(config, section):
            def first_step(topology, values, iteration):
                kept = trainable_edges(topology)
                return tuple(mask & (depth == 1) for depth, mask in enumerate(kept))

            return first_step

        register("first_step", build=build, config=Scale, summary="only the first step is trained")


    @hookimpl
    def register_losses(register):
        def build(config, section):
            return lambda ratio, edges: -config.factor * ratio * edges.advantage

        register("unclipped", build=build, config=Scale, summary="the ratio as it is")
        register("leashed", build=lambda config, section: Leash(config.factor), config=Scale, summary="a KL beside it")


    @dataclass(frozen=True)
    class Leash:
        weight: float
        compares_transitions = True

        def __call__(self, ratio, edges):
            return -ratio * edges.advantage + self.weight * edges.transition.kl(edges.old, "mean")


    @hookimpl
    def register_ratios(register):
        def build(config, section):
            return lambda edges: (config.factor * (edges.log_prob - edges.old_log_prob)).exp()

        register("powered", build=build, config=Scale, summary="a power of the ratio")


    @hookimpl
    def register_weightings(register):
        def build(config, section):
            return lambda sampler, depth, active: config.factor * (sampler.sigmas[depth] > 0.9).float()

        register("early", build=build, config=Scale, summary="the noisiest steps alone")
"""

GUEST: dict[str, Any] = {
    "tree.steps": 5,
    "tree.splits": [0],
    "run.iterations": 1,
    "run.sample_prompts": 1,
    "callbacks": [],
    "evaluation": None,
}


@pytest.fixture
def stranger(tmp_path: Path, guest_site: Path, plug: Callable[[Path], None]) -> None:
    plug(guest_site)
    plug(fake_distribution(tmp_path, "acme-rules", {"acme": "acme_rules"}, {"acme_rules": RULES_OF_A_STRANGER}))


def trained(output: Path, **changes: Any) -> dict[str, float]:
    """The figures of one iteration of the guest under a rule."""
    train("guest", {**GUEST, **{key.replace("__", "."): value for key, value in changes.items()}}, output=output)
    return metrics(output)[0]


def test_every_kind_of_rule_has_a_hook_and_built_in_ones() -> None:
    found = registry()
    assert all(found.rules[kind] for kind in RULES)
    assert {"dance", "flow", "cps", "ddim"} == found.rules["transition"].keys()
    assert {"none", "parent_top1", "extreme", "depth"} == found.rules["pruning rule"].keys()
    assert all(entry.distribution == "branchtree-grpo" for kind in RULES for entry in found.rules[kind].values())


@pytest.mark.usefixtures("stranger")
def test_a_transition_of_a_stranger_is_that_of_its_keys(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", sampler__transition={"name": "scaled", "factor": 2}, sampler__eta=0.3)
    expected = trained(tmp_path / "own", sampler__kind="dance", sampler__eta=0.6)
    assert found == expected != trained(tmp_path / "other", sampler__kind="dance", sampler__eta=0.3)


@pytest.mark.usefixtures("stranger")
def test_sibling_noise_of_a_stranger_is_used(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", tree__sibling_noise={"name": "opposite"})
    assert found == trained(tmp_path / "own", tree__siblings="simplex")


LAPLACE = {"sampler__transition": {"name": "laplace", "factor": 0.1}, "tree__sibling_noise": {"name": "laplace"}}


@pytest.mark.usefixtures("stranger")
def test_a_transition_need_not_be_gaussian(tmp_path: Path) -> None:
    """The rollout's densities are those of the gradient pass, and the divergence from the start policy begins at 0."""
    found = trained(tmp_path / "run", **LAPLACE, loss__kl=0.1, optim__steps_per_iteration=2)
    assert found["ratio/first_step_max_deviation"] == 0 < found["ratio/max_deviation"]
    assert found["kl"] > 0 and found["grad_norm"] > 0


@pytest.mark.usefixtures("stranger")
def test_noise_without_a_scale_cannot_weigh_the_loss(tmp_path: Path) -> None:
    changes = {"sampler.transition": LAPLACE["sampler__transition"], "loss.weighting": "noise"}
    with pytest.raises(RecipeError, match=r"loss\.weighting: the noise of the transition 'laplace' has no scale"):
        plan("guest", {**GUEST, **changes})


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("changes", [{"tree.solver": "dpm2m"}, {"tree.continuation": 3}])
def test_steps_that_follow_no_ode_have_no_other_solver(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"{next(iter(changes))}.* of the transition 'laplace' are none"):
        plan("guest", {**GUEST, **changes, "sampler.transition": LAPLACE["sampler__transition"]})


@pytest.mark.usefixtures("stranger")
def test_splits_of_a_stranger_shape_the_tree(tmp_path: Path) -> None:
    keys = {"tree__split_rule": {"name": "second"}, "tree__branches": 3}
    found = trained(tmp_path / "run", **keys)
    assert found == trained(tmp_path / "own", tree__splits=[1], tree__branches=3)
    planned = plan("guest", {**GUEST, "tree.split_rule": {"name": "second"}, "tree.branches": 3})
    assert planned.rollout_rows == found["rows/rollout"]


@pytest.mark.usefixtures("stranger")
def test_an_estimator_of_a_stranger_gives_the_advantages(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", credit__estimator={"name": "signs", "factor": 0.5})
    depths = [value for name, value in found.items() if name.startswith("advantage/abs_mean")]
    assert depths and all(value == pytest.approx(0.5) for value in depths)


@pytest.mark.usefixtures("stranger")
def test_a_pruning_rule_of_a_stranger_says_what_is_trained(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", pruning__rule={"name": "first_step"})
    assert {name for name in found if name.startswith("loss_share")} == {"loss_share/depth_01"}
    planned = plan("guest", {**GUEST, "pruning.rule": {"name": "first_step"}})
    assert planned.gradient_rows == found["rows/gradient"] > 0


@pytest.mark.usefixtures("stranger")
def test_a_loss_of_a_stranger_is_what_is_minimised(tmp_path: Path) -> None:
    """At the first step the ratio is 1, where the clip does nothing: the loss is the built-in one's, twice."""
    found = trained(tmp_path / "run", loss__objective={"name": "unclipped", "factor": 2})
    own = trained(tmp_path / "own", loss__objective={"name": "clipped"})
    assert found["loss"] == pytest.approx(2 * own["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(2 * own["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("stranger")
def test_a_loss_of_a_stranger_may_compare_transitions(tmp_path: Path) -> None:
    """It has the old ones at every optimiser step, for a forward, and they are those of the rollout at the first."""
    keys = {"optim__steps_per_iteration": 2, **LAPLACE}
    found = trained(tmp_path / "run", loss__objective={"name": "leashed", "factor": 1e3}, **keys)
    free = trained(tmp_path / "free", loss__objective={"name": "unclipped"}, **keys)
    assert 0 == free["rows/rescored"] < found["rows/rescored"] < found["rows/gradient"]
    assert found["ratio/first_step_max_deviation"] == 0
    assert found["loss"] > free["loss"]


@pytest.mark.usefixtures("stranger")
def test_a_ratio_of_a_stranger_is_what_is_compared(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", loss__ratio_rule={"name": "powered", "factor": 3})
    own = trained(tmp_path / "own", loss__ratio_rule={"name": "plain"})
    assert found["loss"] == own["loss"]
    assert found["grad_norm"] == pytest.approx(3 * own["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("stranger")
def test_a_weighting_of_a_stranger_says_which_steps_count(tmp_path: Path) -> None:
    found = trained(tmp_path / "run", loss__weighting_rule={"name": "early"})
    shares = {name: value for name, value in found.items() if name.startswith("loss_share")}
    assert shares["loss_share/depth_01"] > 0 and shares["loss_share/depth_04"] == 0
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.usefixtures("stranger")
def test_a_mask_by_divergence_needs_no_gaussian(tmp_path: Path) -> None:
    keys = {"optim__steps_per_iteration": 2, "loss__trust": "divergence", **LAPLACE}
    found = trained(tmp_path / "run", **keys, loss__max_divergence=1e-9)
    assert found["ratio/clipped_fraction"] > 0 < found["rows/rescored"]


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize(("key", "value", "remedy"), [("ratio", "centred", "plain"), ("weighting", "gradient", "none")])
def test_rules_for_gaussian_transitions_refuse_others(key: str, value: str, remedy: str) -> None:
    changes = {**GUEST, "sampler.transition": LAPLACE["sampler__transition"], f"loss.{key}": value}
    message = rf"loss\.{key}: {value} is for Gaussian .* 'laplace' are not; set it to {remedy}"
    with pytest.raises(RecipeError, match=message):
        plan("guest", changes)


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (
            "sampler.transition",
            {"name": "scalde"},
            PluginError,
            "no transition 'scalde' .* did you mean 'scaled'",
        ),
        ("sampler.transition", {"name": "scaled", "faktor": 1}, RecipeError, "sampler.transition.faktor"),
        ("pruning.rule", {"name": "depth", "size": 3}, RecipeError, "pruning.rule.size"),
        ("credit.estimator", {}, RecipeError, "credit.estimator.name"),
        ("loss.objective", "unclipped", RecipeError, "loss.objective"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train("guest", {**GUEST, key: value}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_built_in_rule_can_be_named_in_both_ways() -> None:
    plain, named = (
        load_recipe("quickstart", changes)
        for changes in (
            {"sampler.kind": "flow", "tree.siblings": "simplex", "tree.splits": "single", "tree.branches": 4},
            {
                "sampler.transition": {"name": "flow"},
                "tree.sibling_noise": {"name": "simplex"},
                "tree.split_rule": {"name": "single"},
                "tree.branches": 4,
                "pruning.rule": {"name": "none"},
            },
        )
    )
    assert make_kernel(plain.sampler, "velocity") == make_kernel(named.sampler, "velocity")
    assert make_siblings(plain.tree) == make_siblings(named.tree)
    assert make_schedule(plain).plan(3, 5).splits == make_schedule(named).plan(3, 5).splits
    assert make_prune(plain.pruning) is make_prune(named.pruning) is None
