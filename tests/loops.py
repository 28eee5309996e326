"""A driven pipeline against its own loop, and its batches against their rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.small.pipelines import Small
from small_pipelines import ask, past_images
from torch import Tensor, nn

from branchtree.core.padding import pad_together

PROMPTS = ("one", "two words", "three")
LEVELS = (0.9, 0.5, 0.25)


def made_driver(family: Small, pipeline: Any) -> PipelineDriver:
    made = PipelineDriver(pipeline, family.call, torch.device("cpu"))
    made.learn(ask(family, "a cat"), ask(family, "a much longer text"))
    return made


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one, with zeros at the ends of those that are shorter."""
    return {name: pad_together([row[name][0] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def pipeline(family: Small) -> Any:
    """The pipeline of a module's own fixture ``family``."""
    return family.build()


@pytest.fixture(scope="module")
def driver(family: Small, pipeline: Any) -> PipelineDriver:
    """Its driver."""
    return made_driver(family, pipeline)


@pytest.fixture(scope="module")
def packed(family: Small, driver: PipelineDriver) -> Mapping[str, Tensor]:
    """The encodings of three prompts, one row each."""
    return padded([driver.encode(ask(family, prompt)) for prompt in PROMPTS])


def one_row(packed: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in packed.items()}


def states(driver: PipelineDriver, count: int = 3) -> Tensor:
    return torch.stack([driver.noise(torch.Generator().manual_seed(seed)) for seed in range(count)])


def require_rows_alone(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    """Compare rows of several prompts and noise levels in one batch with what each gives alone."""
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


def require_gradients_alone(driver: PipelineDriver, packed: Mapping[str, Tensor]) -> None:
    """Compare the gradients of all weights of a batch with those of its rows."""
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


def require_own_loop(family: Small, pipeline: Any, driver: PipelineDriver, tolerance: float = 1e-5) -> None:
    """Compare one prompt's deterministic rollout with the own loop of ``pipeline``, which ``driver`` drives."""
    steps, seed = 4, 5
    plain = with_plain_solver(pipeline)
    if plain is not pipeline:
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
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


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


def require_decoded_alone(driver: PipelineDriver, packed: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare samples that are decoded together with what each gives alone."""
    state = states(driver)
    together = driver.decode(state, packed)
    for i in range(len(state)):
        torch.testing.assert_close(
            together[i], driver.decode(state[i : i + 1], one_row(packed, i))[0], atol=tolerance, rtol=0
        )
