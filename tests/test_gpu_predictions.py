"""A prediction on the pretended GPU, once its inputs are there, never makes the host wait."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.wan import Wan, WanConfig
from pretend_gpu import pretend_gpu
from small_pipelines import options
from tiny_flux import tiny_flux
from tiny_wan import FRAMES, SIZE, Kind, tiny_wan, write_frame

from branchtree.core.transfer import send
from branchtree.plugins import Condition

GPU = torch.device("cuda", 0)


def flux(folder: Path) -> tuple[Flux, Condition]:
    config = FluxConfig(path=str(tiny_flux(folder)), height=16, width=16)
    return Flux(config), Condition("a three")


def wan(folder: Path) -> tuple[Wan, Condition]:
    model = tiny_wan(folder, Kind(image_encoder=True))
    config = WanConfig(path=str(model), height=SIZE, width=SIZE, frames=FRAMES, guidance=2.0)
    return Wan(config), Condition("a three", image=write_frame(folder / "frame.png", 0))


def sd3(folder: Path) -> tuple[Diffusers, Condition]:
    return Diffusers(DiffusersConfig.model_validate(options("sd3"))), Condition("a three")


@pytest.mark.parametrize("make", [flux, wan, sd3])
def test_a_prediction_does_not_wait(make: type[object], tmp_path: Path) -> None:
    adapter, condition = make(tmp_path)  # type: ignore[misc]
    with pretend_gpu() as counts, torch.no_grad():
        adapter.load(GPU, torch.float32, torch.float32)
        encoded = adapter.encode([condition] * 2)
        conditioning = {name: send(value, GPU) for name, value in encoded.items()}
        noise = [adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)]
        latents, sigma = send(torch.stack(noise), GPU), torch.full((2,), 0.5, device=GPU)
        adapter.predict(latents, sigma, conditioning)  # position ids are made once
        counts.clear()
        found = adapter.predict(latents, sigma, conditioning)
        assert not counts.blocking()
        assert found.device == GPU and found.isfinite().all()
