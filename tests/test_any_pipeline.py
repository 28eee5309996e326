"""Pipelines of many families, driven through their own call: what one step gives is what their own loop does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import loops
import pytest
import torch
from branchtree_adapters.any_pipeline.driver import PipelineDriver, rows_of_calls
from branchtree_adapters.any_pipeline.families import family_of
from branchtree_adapters.any_pipeline.published import published_models
from branchtree_adapters.small.pipelines import PIPELINES, Small
from garbage import no_collection
from loops import (
    LEVELS,
    PROMPTS,
    made_driver,
    padded,
    require_decoded_alone,
    require_gradients_alone,
    require_own_loop,
    require_rows_alone,
    states,
)
from small_pipelines import ask, small_constants
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from branchtree.errors import ModelError

pipeline, driver, packed = loops.pipeline, loops.driver, loops.packed
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's float32 regions


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest) -> Iterator[Small]:
    family = PIPELINES[request.param]
    with small_constants(family):
        yield family


def test_published_models_are_listed_with_their_work(
    family: Small, driver: PipelineDriver, packed: Mapping[str, Tensor]
) -> None:
    listed = [model for model in published_models() if any(PIPELINES[name] is family for name in model.small)]
    with rows_of_calls(driver.denoisers.values()) as calls:
        driver.predict(states(driver, 1), torch.tensor([0.5]), {name: value[:1] for name, value in packed.items()})
    if "spatio_temporal_guidance_blocks" not in family.call:  # a further call, which LTX-2's recipe leaves out
        assert {model.work for model in listed} <= {f"{calls[0]} x {len(calls)}"}
    assert {model.pipeline for model in listed} <= {family.pipeline}


def test_rows_of_several_prompts_and_levels_are_rows_alone(
    driver: PipelineDriver, packed: Mapping[str, Tensor]
) -> None:
    require_rows_alone(driver, packed)


def test_images_make_a_difference(family: Small, driver: PipelineDriver) -> None:
    if not family.images:
        return
    asked, other = ask(family, "one"), ask(family, "another")
    state, sigma = states(driver, 1), torch.tensor(LEVELS[:1])
    with torch.no_grad():
        found = [
            driver.predict(state, sigma, driver.encode(replace(asked, extra=each.extra))) for each in (asked, other)
        ]
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_gradients_are_those_of_each_row(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    require_gradients_alone(driver, packed)


def test_a_prediction_is_freed_with_its_graph(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    """At once, not when Python next looks for cycles: a graph is most of a GPU's memory."""
    denoiser = nn.ModuleDict(driver.denoisers).requires_grad_(True)
    kept: list[weakref.ref[Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(weakref.ref(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))))

    hooks = [module.register_forward_hook(note) for module in driver.denoisers.values()]
    try:
        with no_collection():
            predicted = driver.predict(states(driver), torch.tensor(LEVELS), packed)
            assert predicted.requires_grad and kept
            kept.append(weakref.ref(predicted))
            del predicted
            assert [each() for each in kept] == [None] * len(kept)
    finally:
        denoiser.requires_grad_(False)
        for hook in hooks:
            hook.remove()


def test_the_loop_is_the_pipelines_own(family: Small, pipeline: Any, driver: PipelineDriver) -> None:
    """With Euler's method, or DDIM's where noise is predicted; other schedulers take other steps."""
    require_own_loop(family, pipeline, driver)


def test_samples_are_decoded_as_alone(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    require_decoded_alone(driver, packed)


@pytest.mark.parametrize(
    ("family", "numbers"), [("wan_image_expanded", 4 * 8 * 8), ("ltx_image", 8 * 8 * 8)], indirect=["family"]
)
def test_a_given_frame_is_no_state(driver: PipelineDriver, numbers: int) -> None:
    """Both have two latent frames, and the first is the image."""
    assert torch.Size(driver.state_shape).numel() == numbers


@pytest.mark.parametrize(
    "name", ["flux", "flux_kontext", "sd3", "qwen_image", "ltx", "ltx_image", "ltx2", "wan", "sdxl"]
)
@pytest.mark.parametrize("halved", ["denoiser", "encoders"])
def test_the_denoiser_may_have_a_precision_of_its_own(name: str, halved: str) -> None:
    family = PIPELINES[name]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = family.build()
        for component, module in pipeline.components.items():
            encodes = component.startswith("text_encoder")
            if isinstance(module, nn.Module) and component != "vae" and encodes == (halved == "encoders"):
                module.to(dtype)
        driver = made_driver(family, pipeline)
        packed = padded([driver.encode(ask(family, prompt)) for prompt in PROMPTS])
        with torch.no_grad():
            found.append(driver.predict(states(driver), torch.tensor(LEVELS), packed))
        assert found[-1].dtype == torch.float32
        assert bool(driver.decode(states(driver), packed).isfinite().all())
    full, half = found
    assert 0 < float((half - full).norm() / full.norm()) < 0.1


def truncated(pipeline: Any) -> dict[str, Any]:
    return {"cfg_trunc_ratio": 0.5}


def skipping(pipeline: Any) -> dict[str, Any]:
    return {"skip_guidance_layers": [1]}


def scheduled(pipeline: Any) -> dict[str, Any]:
    return {"guidance_schedule": (7.0, 3.0), "guidance_scale": None}


def stopping(pipeline: Any) -> dict[str, Any]:
    pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0, stop=0.8)
    return {}


def adaptive(pipeline: Any) -> dict[str, Any]:
    pipeline.guider = diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0)
    return {}


def called_back(pipeline: Any) -> dict[str, Any]:
    return {"callback_on_step_end": print}


@pytest.mark.parametrize(
    ("name", "change", "remedy"),
    [
        ("lumina2", truncated, "cfg_trunc_ratio"),
        ("sd3", skipping, "skip_guidance_layers"),
        ("ideogram4", scheduled, "guidance_schedule"),
        ("hunyuan15", stopping, "start 0 and stop 1"),
        ("hunyuan15", adaptive, "ClassifierFreeGuidance"),
        ("flux", called_back, "callback_on_step_end"),
    ],
)
def test_settings_that_count_steps_are_refused(
    name: str, change: Callable[[Any], Mapping[str, Any]], remedy: str
) -> None:
    family = PIPELINES[name]
    pipeline = family.build()
    with pytest.raises(ModelError, match=remedy):
        PipelineDriver(pipeline, {**family.call, **change(pipeline)}, torch.device("cpu"))


def test_the_default_schedule_of_ideogram4_is_refused() -> None:
    family = PIPELINES["ideogram4"]
    with pytest.raises(ModelError, match="guidance_schedule"):
        PipelineDriver(family.build(), {"height": 32, "width": 32}, torch.device("cpu"))


@pytest.mark.parametrize("pipeline", ["HunyuanImagePipeline", "HunyuanVideo15ImageToVideoPipeline"])
def test_mean_flow_is_refused(pipeline: str) -> None:
    family = family_of(getattr(diffusers, pipeline))
    for used in (False, True):
        made = SimpleNamespace(transformer=SimpleNamespace(config={"use_meanflow": used}))
        with pytest.raises(ModelError, match="use_meanflow") if used else nullcontext():
            family.check(made, {})
