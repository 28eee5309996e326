"""``sampler.grid: pipeline``: equal to what a call of diffusers' own pipeline steps through, or refused."""

from typing import Any

import pytest
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.wan import Wan, WanConfig
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny_flux import T5_TOKENS, tiny_flux
from tiny_wan import FRAMES, SIZE, Kind, tiny_wan
from torch import Tensor

from branchtree.core.grid import check_grid
from branchtree.errors import ModelError

CPU = torch.device("cpu")
STEPS = 5
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DYNAMIC = {"use_dynamic_shifting": True}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux, FluxPipeline]:
    path = tiny_flux(tmp_path_factory.mktemp("flux"))
    adapter = Flux(FluxConfig(path=str(path), height=32, width=48))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter, FluxPipeline.from_pretrained(path)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Wan, WanPipeline]:
    path = tiny_wan(tmp_path_factory.mktemp("wan"), Kind(image_to_video=False))
    sizes = {"task": "text_to_video", "height": SIZE, "width": SIZE, "frames": FRAMES}
    adapter = Wan(WanConfig.model_validate({"path": str(path), **sizes}))
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter, WanPipeline.from_pretrained(path)


def walked(pipeline: Any, scheduler: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The noise levels of a whole call of the pipeline, and the times that its model was given, in thousandths."""
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    times: list[float] = []

    def note(module: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        times.append(float(named["timestep"][0]))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipeline("a red three", num_inference_steps=STEPS, output_type="latent", **options)
    finally:
        hook.remove()
    scale = 1000 if isinstance(pipeline, FluxPipeline) else 1
    return scheduler.sigmas, scale * torch.tensor(times)


def call_flux(pipeline: FluxPipeline, scheduler: Any) -> tuple[Tensor, Tensor]:
    return walked(pipeline, scheduler, height=32, width=48, max_sequence_length=T5_TOKENS)


def call_wan(pipeline: WanPipeline, scheduler: Any) -> tuple[Tensor, Tensor]:
    sizes = {"height": SIZE, "width": SIZE, "num_frames": FRAMES}
    return walked(pipeline, scheduler, guidance_scale=1.0, **sizes)


def require_equal(adapter: Flux | Wan, scheduler: Any, walked: tuple[Tensor, Tensor]) -> None:
    adapter.pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    ours = adapter.sigmas(STEPS)
    check_grid(ours)
    assert torch.equal(ours, walked[0])
    assert (1000 * ours[:-1] - walked[1]).abs().max() <= 1  # some schedulers hand down whole numbers


EULER: list[dict[str, Any]] = [
    {"shift": 3.0},
    {"shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"stochastic_sampling": True},
    {"shift": 3.0, "shift_terminal": 0.1, "use_karras_sigmas": True},
]


@pytest.mark.parametrize(
    "settings", [*EULER, DYNAMIC, {**DYNAMIC, "shift_terminal": 0.02}, {"time_shift_type": "linear"}]
)
def test_euler_on_flux(flux: tuple[Flux, FluxPipeline], settings: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    require_equal(flux[0], scheduler, call_flux(flux[1], scheduler))


@pytest.mark.parametrize("settings", EULER)
def test_euler_on_wan(wan: tuple[Wan, WanPipeline], settings: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    require_equal(wan[0], scheduler, call_wan(wan[1], scheduler))


MULTISTEP: list[tuple[type[Any], dict[str, Any]]] = [
    (UniPCMultistepScheduler, {"flow_shift": 5.0}),
    (UniPCMultistepScheduler, {"flow_shift": 5.0, "use_karras_sigmas": True}),
    (UniPCMultistepScheduler, {"flow_shift": 5.0, "shift_terminal": 0.1}),
    (DPMSolverMultistepScheduler, {"flow_shift": 5.0}),
    (DPMSolverMultistepScheduler, {"flow_shift": 5.0, "algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize(("kind", "settings"), MULTISTEP)
def test_multistep_schedulers_on_wan(wan: tuple[Wan, WanPipeline], kind: type[Any], settings: dict[str, Any]) -> None:
    scheduler = kind(**FLOW, **settings)
    require_equal(wan[0], scheduler, call_wan(wan[1], scheduler))


@pytest.mark.parametrize("settings", [{"flow_shift": 5.0}, DYNAMIC])
def test_unipc_on_flux(flux: tuple[Flux, FluxPipeline], settings: dict[str, Any]) -> None:
    scheduler = UniPCMultistepScheduler(**FLOW, **settings)
    require_equal(flux[0], scheduler, call_flux(flux[1], scheduler))


REFUSED: list[tuple[Any, str]] = [
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas: True"),
    (FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), "num_train_timesteps: 500"),
    (UniPCMultistepScheduler(), "of '.*' gives no flow-matching grid"),
    (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
    (DEISMultistepScheduler(**FLOW, flow_shift=5.0), "must fall strictly"),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0), "one of epsilon.*use_flow_sigmas: True"),
    (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "use_karras_sigmas: True"),
    (DPMSolverMultistepScheduler(**FLOW, use_lu_lambdas=True), "use_lu_lambdas: True"),
    (UniPCMultistepScheduler(**FLOW, use_exponential_sigmas=True), "use_exponential_sigmas: True"),
    (UniPCMultistepScheduler(**FLOW, use_beta_sigmas=True), "use_beta_sigmas: True"),
    (UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), "final_sigmas_type: sigma_min"),
]


@pytest.mark.parametrize(("scheduler", "named"), REFUSED)
def test_other_grids_are_refused(
    flux: tuple[Flux, FluxPipeline], wan: tuple[Wan, WanPipeline], scheduler: Any, named: str
) -> None:
    for adapter in (flux[0], wan[0]):
        adapter.pipeline.scheduler = scheduler
        with pytest.raises(ModelError, match=f"sampler.grid 'pipeline': {type(scheduler).__name__}.*gives no flow"):
            adapter.sigmas(STEPS)
    with pytest.raises(ModelError, match=named):
        wan[0].sigmas(STEPS)


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(**DYNAMIC), UniPCMultistepScheduler(**FLOW, **DYNAMIC)]
)
def test_a_shift_that_wans_pipeline_does_not_pass_is_refused(wan: tuple[Wan, WanPipeline], scheduler: Any) -> None:
    with pytest.raises(ValueError, match="`mu` must be passed"):
        call_wan(wan[1], scheduler)
    wan[0].pipeline.scheduler = scheduler
    with pytest.raises(ModelError, match=r"`mu` must be passed.*use_dynamic_shifting: True.*Set sampler.grid to"):
        wan[0].sigmas(STEPS)


def test_what_fluxs_pipeline_cannot_call_is_refused(flux: tuple[Flux, FluxPipeline]) -> None:
    scheduler = DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0)
    with pytest.raises(AssertionError):
        call_flux(flux[1], scheduler)
    flux[0].pipeline.scheduler = scheduler
    with pytest.raises(ModelError, match=r"DPMSolverMultistepScheduler .* gives no flow-matching grid"):
        flux[0].sigmas(STEPS)
