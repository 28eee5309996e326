"""Every small pipeline through the adapter ``diffusers``: gradients, decoding, LoRA files and an iteration of training.

What the adapter does is compared with a second pipeline that runs its own call, unwrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers, opaque
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.small.pipelines import PIPELINES, Small
from loops import with_plain_solver
from pipeline_checks import (
    another,
    case_of,
    first_step,
    gradients_of,
    inputs_of,
    kept,
    level_of,
    load_lora,
    one_iteration,
    own_decoding,
    own_picture,
    state_of,
)
from shipped_recipes import DRIVEN, small_family
from small_pipelines import options, small_constants

from branchtree.plugins import Condition, LoraSettings
from branchtree.testing import AdapterCase
from branchtree.testing.probe import randomise

pytestmark = pytest.mark.filterwarnings(
    "ignore:In CPU autocast",
    "ignore:Mismatch dtype between input and weight",  # of float32 regions and norms
)
CPU = torch.device("cpu")
TRAINED = [small_family(name) for name in DRIVEN]
"""What test_published.py and test_gpu_runs.py train."""


@dataclass(frozen=True)
class Loaded:
    """A small pipeline in the adapter, and the same one on its own."""

    family: Small
    case: AdapterCase
    condition: Condition
    model: Diffusers
    own: Any


@pytest.fixture(scope="module", params=PIPELINES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    family = PIPELINES[request.param]
    with small_constants(family):
        case = case_of(family, options(request.param), tmp_path_factory.mktemp(request.param))
        model = case.build()
        assert isinstance(model, Diffusers)
        own = family.build()
        own.set_progress_bar_config(disable=True)
        unloaded = PipelineDriver(own, model.call, CPU)  # in the place of one without weights: see test_phantom.py
        unloaded.learn(*model._examples)
        model.__dict__["_unloaded"] = unloaded
        model.load(CPU, torch.float32, torch.float32)
        yield Loaded(family, case, inputs_of(case, model, {}).conditions[0], model, own)


def test_gradients_are_those_of_the_pipelines_own_step(loaded: Loaded) -> None:
    """To the bit, where the adapter's memory is laid out as the pipeline's."""
    plain, driver = with_plain_solver(loaded.own), loaded.model.driver
    own, condition = {name: getattr(plain, name) for name in driver.denoisers}, loaded.condition
    for module in (*own.values(), *driver.denoisers.values()):
        module.requires_grad_(True)
    steps = first_step(loaded.family, plain, condition, len(driver.layout.states))
    output = state_of(driver, steps.outputs) * (-1 if plain.scheduler.config.get("invert_sigmas") else 1)
    found = loaded.model.predict(
        state_of(driver, steps.samples).detach(),
        level_of(plain, steps.times[0]).reshape(1),
        loaded.model.encode([condition]),
    )
    torch.testing.assert_close(found, output, rtol=0, atol=1e-5 * float(output.detach().abs().max()))
    expected, gradients = gradients_of(own, output), gradients_of(driver.denoisers, found)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in gradients.items():
        assert bool(value.isfinite().all()), name
        assert bool(value.any()) == bool(expected[name].any()), name
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * scale)
    assert sum(bool(value.any()) for value in gradients.values()) > 0.8 * len(gradients)


def test_samples_are_decoded_as_the_pipeline_does(loaded: Loaded) -> None:
    driver, condition = loaded.model.driver, loaded.condition
    state = 0.5 * loaded.model.initial_noise(torch.Generator().manual_seed(1))[None]
    expected = opaque(own_decoding(loaded.family, loaded.own, driver, condition, state))
    found = loaded.model.decode(state, loaded.model.encode([condition])).pixels
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_an_iteration_in_bf16_begins_at_a_ratio_of_one(loaded: Loaded, tmp_path: Path) -> None:
    """With all weights trained, freshly loaded; rows are those of the plan and the metrics."""
    require_exact(one_iteration(loaded.case, another(loaded.case, loaded.model), "bf16", tmp_path, lora=False))


def test_an_iteration_of_lora_begins_at_a_ratio_of_one(loaded: Loaded, tmp_path: Path) -> None:
    """In float32. The model keeps its LoRA for the next test."""
    if any(loaded.family is each for each in TRAINED):
        pytest.skip("a recipe's small version, which another test trains, is this model with a LoRA")
    require_exact(one_iteration(loaded.case, kept(loaded.model), "fp32", tmp_path, lora=True))


def require_exact(done: Any) -> None:
    assert done.metrics["ratio/max_deviation"] == 0.0
    assert done.metrics["grad_norm"] > 0
    assert done.seen == done.planned
    assert (done.metrics["rows/rollout"], done.metrics["rows/gradient"]) == (done.seen.rollout, done.seen.gradient)


def test_a_saved_lora_is_read_by_the_pipeline_itself(loaded: Loaded, tmp_path: Path) -> None:
    """By ``load_lora_weights``, or by a denoiser's own method where the pipeline has none for it."""
    family, model, condition = loaded.family, loaded.model, loaded.condition
    if not any("lora" in name for name, _ in model.denoiser.named_parameters()):
        model.add_lora(LoraSettings(rank=4, alpha=8.0), seed=0)
    randomise(model.denoiser)
    model.export(tmp_path)
    with_lora = model.with_encoders()
    with_lora.set_progress_bar_config(disable=True)
    before, expected = (own_picture(family, each, condition) for each in (loaded.own, with_lora))
    first, *others = model.denoisers
    if hasattr(loaded.own, "load_lora_weights"):
        loaded.own.load_lora_weights(tmp_path)
    else:
        load_lora(getattr(loaded.own, first), tmp_path)
    for name in others:
        load_lora(getattr(loaded.own, name), tmp_path / name)
    found = own_picture(family, loaded.own, condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert float((found - before).abs().max()) > 2e-4
