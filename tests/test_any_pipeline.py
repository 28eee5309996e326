"""Pipelines of many families, driven through their own call: what one step gives is what their own loop does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.any_pipeline.families import family_of
from branchtree_adapters.small.pipelines import PIPELINES, Small
from small_pipelines import ask, past_images, small_constants
from torch import Tensor, nn

from branchtree.core.padding import pad_together
from branchtree.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's float32 regions

PROMPTS = ("one", "two words", "three")
LEVELS = (0.9, 0.5, 0.25)


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest) -> Iterator[Small]:
    family = PIPELINES[request.param]
    with small_constants(family):
        yield family


@pytest.fixture(scope="module")
def pipeline(family: Small) -> Any:
    return family.build()


def made_driver(family: Small, pipeline: Any) -> PipelineDriver:
    made = PipelineDriver(pipeline, family.call, torch.device("cpu"))
    made.learn(ask(family, "a cat"), ask(family, "a much longer text"))
    return made


@pytest.fixture(scope="module")
def driver(family: Small, pipeline: Any) -> PipelineDriver:
    return made_driver(family, pipeline)


@pytest.fixture(scope="module")
def packed(family: Small, driver: PipelineDriver) -> Mapping[str, Tensor]:
    return padded([driver.encode(ask(family, prompt)) for prompt in PROMPTS])


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one, with zeros at the ends of those that are shorter."""
    return {name: pad_together([row[name][0] for row in rows]) for name in rows[0]}


def one_row(packed: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in packed.items()}


def states(driver: PipelineDriver, count: int = 3) -> Tensor:
    return torch.stack([driver.noise(torch.Generator().manual_seed(seed)) for seed in range(count)])


def test_rows_of_several_prompts_and_levels_are_rows_alone(
    driver: PipelineDriver, packed: Mapping[str, Tensor]
) -> None:
    state, sigma = states(driver), torch.tensor(LEVELS)
    with torch.no_grad():
        together = driver.predict(state, sigma, packed)
        alone = torch.cat(
            [driver.predict(state[i : i + 1], sigma[i : i + 1], one_row(packed, i)) for i in range(len(state))]
        )
    scale = float(alone.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * max(scale, 1))
    assert not torch.allclose(alone[0], driver.predict(state[:1], sigma[:1], one_row(packed, 1)).detach()[0], atol=1e-6)


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


def test_gradients_are_those_of_each_row(driver: PipelineDriver, pipeline: Any, packed: Mapping[str, Tensor]) -> None:
    state, sigma = states(driver), torch.tensor(LEVELS)
    denoiser = nn.ModuleDict(driver.denoisers).requires_grad_(True)
    try:
        weight = torch.randn(state.shape, generator=torch.Generator().manual_seed(3))

        def gradients(rows: Sequence[slice]) -> dict[str, Tensor]:
            denoiser.zero_grad()
            for span in rows:
                chosen = {name: value[span] for name, value in packed.items()}
                (driver.predict(state[span], sigma[span], chosen) * weight[span]).sum().backward()
            return {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}

        together, alone = gradients([slice(None)]), gradients([slice(i, i + 1) for i in range(len(state))])
    finally:
        denoiser.requires_grad_(False)
    assert together.keys() == alone.keys() and len(together) > 10
    scale = max(float(value.abs().max()) for value in alone.values())
    for name, value in together.items():
        assert bool(value.isfinite().all()), name
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5 * scale)


def test_the_loop_is_the_pipelines_own(family: Small, pipeline: Any) -> None:
    """With Euler's method, or DDIM's where noise is predicted; other schedulers take other steps."""
    steps, seed = 4, 5
    plain = with_plain_solver(pipeline)
    driver = made_driver(family, plain)
    asked = ask(family, PROMPTS[0])
    one = driver.encode(asked)
    state = driver.noise(past_images(family, torch.Generator().manual_seed(seed)))[None]
    expected = plain(
        prompt=asked.prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        return_dict=False,
        **family.call,
        **asked.extra,
        **({} if family.negative is None else {"negative_prompt": family.negative}),
    )[0]
    with torch.no_grad():
        for sigma, following in pairwise(driver.grid(steps)):
            state = step_of(driver)(state, driver.predict(state, sigma.reshape(1), one), sigma, following)
        found = driver.decode(state, one)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def with_plain_solver(pipeline: Any) -> Any:
    """The pipeline with a scheduler that takes the steps below, on the same noise levels."""
    config = pipeline.scheduler.config
    predicts_noise = config.get("prediction_type") == "epsilon"
    plain = diffusers.DDIMScheduler if predicts_noise else diffusers.FlowMatchEulerDiscreteScheduler
    if isinstance(pipeline.scheduler, plain):
        return pipeline
    other = copy.copy(pipeline)
    if predicts_noise:
        other.scheduler = plain.from_config(config, clip_sample=False, timestep_spacing="leading", steps_offset=1)
    else:
        other.scheduler = plain(shift=config["flow_shift"])
    return other


def euler(state: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    return state + (following - sigma) * velocity


def ddim(state: Tensor, noise: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    clean = (state - sigma * noise) / (1 - sigma.square()).sqrt()
    return (1 - following.square()).sqrt() * clean + following * noise


def step_of(driver: PipelineDriver) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return euler if driver.prediction == "velocity" else ddim


def test_samples_are_decoded_as_alone(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    state = states(driver)
    together = driver.decode(state, packed)
    for i in range(len(state)):
        torch.testing.assert_close(
            together[i], driver.decode(state[i : i + 1], one_row(packed, i))[0], atol=1e-5, rtol=0
        )


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
