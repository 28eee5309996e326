"""Pipelines picked at random of those that diffusers has and the library does not name.

They are driven by the same code as all others; nothing in the library knows of them. What is picked from: the classes
that diffusers exports (those whose packages are not installed are not among them) which

- are not deprecated,
- belong to none of the packages of diffusers in which the library named a pipeline when these were picked,
- make images or videos of a size that is asked for, from a prompt, and need nothing beside it but an image,
- consist of a VAE, a scheduler and a transformer or U-Net,
- take no mask, control image or strength: their states do not start from noise alone, or need more than a prompt holds.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import loops
import pytest
import torch
from branchtree_adapters.any_pipeline import recording
from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.small import images
from branchtree_adapters.small.pipelines import Small
from loops import (
    PROMPTS,
    made_driver,
    require_decoded_alone,
    require_gradients_alone,
    require_own_loop,
    require_rows_alone,
)
from pipeline_checks import another, case_of, one_iteration
from small_pipelines import ask, options_of
from torch import Tensor
from unnamed_pipelines import CHOSEN, UNNAMED

from branchtree.errors import ModelError
from branchtree.testing.probe import make_question, predict_rows

pipeline, driver, packed = loops.pipeline, loops.driver, loops.packed
SEED, COUNT = 0, 5
PICKED_FROM = "0.42.1"
"""The release of diffusers."""
NAMED = frozenset(
    """aura_flow chroma cogvideo cogview4 flux flux2 hunyuan_image hunyuan_video1_5 ideogram4 kandinsky5 krea2 ltx ltx2
    lumina2 mochi pixart_alpha qwenimage qwenimage21 sana sana_video stable_diffusion stable_diffusion_3
    stable_diffusion_xl wan z_image""".split()  # noqa: SIM905
)
"""Packages of diffusers in which the library named a pipeline."""
MORE = frozenset(
    {
        "mask",
        "mask_image",
        "mask_video",
        "control_image",
        "control_video",
        "controls",
        "strength",
        "pag_scale",
        "controlnet_conditioning_scale",
        "adapter_conditioning_scale",
    }
)
"""Arguments of pipelines that start from something else than noise, or need more than a prompt and an image."""
TOLERANCES = {"HunyuanVideoImageToVideoPipeline": 3e-3}  # it mixes a thousandth of the image into its noise
OWN_SCHEDULER = {"LatentConsistencyModelPipeline"}  # whose solver draws noise at each step


def belongs(name: str) -> bool:
    """Whether a class is one of those that are picked from."""
    kind = getattr(diffusers, name)
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        return False
    package = kind.__module__.removeprefix("diffusers.pipelines.").split(".")[0]
    takes = inspect.signature(inspect.unwrap(vars(kind).get("__call__", print))).parameters
    consists = inspect.signature(kind.__init__).parameters.keys()
    plain = (each for each in takes.values() if each.kind is each.POSITIONAL_OR_KEYWORD)
    needs = {each.name for each in plain if each.default is each.empty} - {"self"}
    return (
        package not in NAMED | {"deprecated", "consisid"}  # the latter is there only where OpenCV is
        and not hasattr(kind, "_last_supported_version")
        and {"prompt", "height"} <= takes.keys()
        and needs <= {"prompt", "image"}
        and {"vae", "scheduler"} <= consists
        and bool({"transformer", "unet"} & consists)
        and not takes.keys() & MORE
    )


@pytest.mark.skipif(diffusers.__version__ != PICKED_FROM, reason="another release has other pipelines")
def test_these_were_picked() -> None:
    found = [name for name in sorted(dir(diffusers)) if name.endswith("Pipeline") and belongs(name)]
    assert len(found) == 47
    assert sorted(random.Random(SEED).sample(found, COUNT)) == sorted(UNNAMED)


@pytest.fixture(scope="module", params=[*UNNAMED, *CHOSEN])
def family(request: pytest.FixtureRequest) -> Small:
    return {**UNNAMED, **CHOSEN}[request.param]


def test_rows_of_several_prompts_and_levels_are_rows_alone(
    driver: PipelineDriver, packed: Mapping[str, Tensor]
) -> None:
    require_rows_alone(driver, packed)


def test_gradients_are_those_of_each_row(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    require_gradients_alone(driver, packed)


def test_samples_are_decoded_as_alone(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    require_decoded_alone(driver, packed, tolerance=5e-5)


def test_the_loop_is_the_pipelines_own(family: Small, pipeline: Any, driver: PipelineDriver) -> None:
    if family.pipeline in OWN_SCHEDULER:
        require_own_scheduler(family, pipeline, driver)
    else:
        require_own_loop(family, pipeline, driver, TOLERANCES.get(family.pipeline, 1e-5))


def require_own_scheduler(family: Small, pipeline: Any, driver: PipelineDriver, steps: int = 4) -> None:
    """Compare a rollout by the pipeline's own scheduler with its own loop, noise included."""
    asked, generator = ask(family, PROMPTS[0]), torch.Generator().manual_seed(5)
    expected = pipeline(
        prompt=asked.prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        return_dict=False,
        **family.call,
    )[0]
    one, state, clean = driver.encode(asked), driver.noise(generator)[None], None
    pipeline.scheduler.set_timesteps(steps, original_inference_steps=None)
    with torch.no_grad():
        for time, (sigma, _) in zip(pipeline.scheduler.timesteps, pairwise(driver.grid(steps)), strict=True):
            prediction = driver.predict(state, sigma.reshape(1), one)
            state, clean = pipeline.scheduler.step(prediction, time, state, generator=generator, return_dict=False)
        found = driver.decode(clean, one)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_it_trains(family: Small, pipeline: Any, tmp_path: Path) -> None:
    """For an iteration, whose first ratio is exactly one, and whose rows are as planned."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    case = case_of(family, options_of(family, str(tmp_path / "pipeline")), tmp_path)
    first = case.build()
    assert isinstance(first, Diffusers)
    for number, (precision, lora) in enumerate((("fp32", True), ("bf16", False))):
        model = another(case, first)
        done = one_iteration(case, model, precision, tmp_path / f"run_{number}", lora=lora)
        assert done.metrics["ratio/max_deviation"] == 0.0
        assert done.metrics["grad_norm"] > 0
        assert done.seen == done.planned
        asked = make_question(model, case)
        with_encoders = predict_rows(model, asked)
        model.drop_encoders()
        assert torch.equal(predict_rows(model, asked), with_encoders)


@pytest.mark.parametrize(
    ("kind", "components", "strength"),
    [("StableDiffusion3Img2ImgPipeline", images.sd3, 0.6), ("FluxImg2ImgPipeline", images.flux, None)],
)
def test_pipelines_that_start_from_an_image_are_refused(kind: str, components: Any, strength: float | None) -> None:
    call = {"height": 32, "width": 32, "max_sequence_length": 24}
    family = Small(kind, components, call if strength is None else {**call, "strength": strength}, images=1)
    with pytest.raises(ModelError, match=f"{kind} starts from an image"):
        made_driver(family, family.build())


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    """A pipeline whose latents are half noise."""
    family = Small("StableDiffusion3Pipeline", images.sd3, {"height": 32, "width": 32, "max_sequence_length": 24})
    own = diffusers.StableDiffusion3Pipeline.prepare_latents
    monkeypatch.setattr(
        diffusers.StableDiffusion3Pipeline, "prepare_latents", lambda *args, **kwargs: 0.5 * own(*args, **kwargs) + 1
    )
    yield family


def test_latents_that_are_not_noise_are_refused(mixing: Small) -> None:
    with pytest.raises(ModelError, match=r"latents of which noise is 0\.5"):
        made_driver(mixing, mixing.build())


def test_latents_that_no_method_gives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a pipeline whose method has none of the usual names."""
    monkeypatch.setattr(recording, "NOT_RECORDED", frozenset({"prepare_latents"}))
    family = Small("StableDiffusion3Pipeline", images.sd3, {"height": 32, "width": 32, "max_sequence_length": 24})
    with pytest.raises(ModelError, match="no setting changes that: choose another pipeline class"):
        made_driver(family, family.build())
