"""Pipelines of phantoms against the same pipelines with weights: shapes, operations and memory are the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.any_pipeline.driver import PipelineDriver
from branchtree_adapters.any_pipeline.measure import count_operations, measure
from branchtree_adapters.any_pipeline.unloaded import unloaded_pipeline
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.blueprint import TRANSFORMER
from branchtree_adapters.pipeline.components import quiet
from branchtree_adapters.small.pipelines import PIPELINES, Small
from small_pipelines import ask, options_of, shallow, small_constants
from torch import Tensor, nn

CPU = torch.device("cpu")
T5 = "text_encoder_2/config.json"
OF_EACH_CLASS = {family.pipeline: name for name, family in reversed(PIPELINES.items())}
FAMILIES = sorted(PIPELINES if "BRANCHTREE_ALL_FAMILIES" in os.environ else {*OF_EACH_CLASS.values(), "wan_experts"})
"""The first small pipeline of each class and one of two denoisers, or with BRANCHTREE_ALL_FAMILIES=1 all."""
UNMASKED = 0.06
"""Chroma's blocks get no mask under gradient checkpointing, whose blocks are what is measured."""


def kept_numbers(driver: PipelineDriver, asked: Asked, rows: int) -> int:
    """Float32 numbers that autograd saves in a prediction, weights among them."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    packed = {name: value.repeat(rows, *(1,) * (value.ndim - 1)) for name, value in driver.encode(asked).items()}
    state = torch.zeros(rows, *driver.state_shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = driver.predict(state, torch.full((rows,), 0.5), packed)
    assert velocity.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 4


# Mochi computes its positions under float32 autocast, which a CPU does not have.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_of_phantoms_is_as_the_real_one(name: str, tmp_path: Path) -> None:
    family = shallow(name)
    with small_constants(family):
        compare(name, family, tmp_path)


def compare(name: str, family: Small, folder: Path) -> None:
    """Compare all but the decoder of sound, which is not counted."""
    real = family.build()
    with quiet():
        real.save_pretrained(folder)
    model = Diffusers(DiffusersConfig(**options_of(family, str(folder))))
    driver, other = PipelineDriver(real, model.call, CPU), model._unloaded
    with quiet():
        driver.learn(*model._examples)
    asked = ask(family, "a cat")
    found = measure(other, asked, torch.float32, "here")

    assert found.latent_shape == driver.state_shape
    packed = driver.encode(asked)
    shapes = {key: value.shape for key, value in packed.items()}
    assert {key: value.shape for key, value in other.encode(asked).items()} == shapes

    denoisers = nn.ModuleDict(driver.denoisers).requires_grad_(True)  # else torch computes layers in another way
    calls: list[tuple[nn.Module, Any, Any]] = []
    watches = [
        denoiser.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for denoiser in denoisers.values()
    ]
    state, sigma = torch.zeros(1, *driver.state_shape), torch.tensor([0.5])
    driver.predict(state, sigma, packed)
    for watch in watches:
        watch.remove()
    rows = [len(next(iter((*args, *kwargs.values())))) for _, args, kwargs in calls]
    operations = count_operations(lambda: [denoiser(*args, **kwargs) for denoiser, args, kwargs in calls])
    assert found.rows_per_prediction == sum(rows)
    assert found.forward_flops_per_row * sum(rows) == operations.total
    assert 0 < found.attention_flops_per_row * sum(rows) == operations.attention

    assert found.decoder is not None
    assert found.decoder.media_numbers_per_row == driver.decode(state, packed).numel()
    decoding = count_operations(lambda: driver.decode(state, packed)).total
    assert found.decoder.flops_per_row == decoding or (name == "ltx2" and found.decoder.flops_per_row < decoding)

    kept = kept_numbers(driver, asked, 2) - kept_numbers(driver, asked, 1)
    assert found.activation_numbers_per_row * sum(rows) == pytest.approx(
        kept, rel=UNMASKED if name == "chroma" else 0.02
    )
    assert 0 < found.checkpointed_numbers_per_row < found.activation_numbers_per_row
    assert found.denoiser_parameters == sum(each.numel() for each in denoisers.parameters())


def test_a_published_model_at_full_size() -> None:
    """Of few blocks, each as large as the published ones."""
    adapter = Flux(FluxConfig(path="some-org/not-in-any-cache", height=1024, width=1024))
    configs = dict(adapter.blueprint.configs)
    configs[TRANSFORMER] = {**configs[TRANSFORMER], "num_layers": 6, "num_single_layers": 12}
    configs[T5] = {**configs[T5], "num_layers": 2}
    adapter._blueprint = replace(adapter.blueprint, configs=configs)
    pipeline = unloaded_pipeline(diffusers.FluxPipeline, adapter.blueprint)
    pipeline.vae.register_to_config(shift_factor=0.1159)
    driver = PipelineDriver(pipeline, {"height": 1024, "width": 1024}, CPU)
    driver.learn(Asked("a cat"), Asked("a much longer text"))
    found, derived = measure(driver, Asked("a cat"), torch.bfloat16, "here"), adapter.footprint()
    assert found.latent_shape == derived.latent_shape == (4096, 64)
    for name, error in {
        "denoiser_parameters": 0,
        "frozen_parameters": 0,
        "rows_per_prediction": 0,
        "conditioning_numbers": 0.01,
        "forward_flops_per_row": 0.02,
        "attention_flops_per_row": 0.001,
        "activation_numbers_per_row": 0.05,
        "checkpointed_numbers_per_row": 0.05,
        "forward_numbers_per_row": 0.1,
        "largest_block_parameters": 0,
    }.items():
        assert getattr(found, name) == pytest.approx(getattr(derived, name), rel=error), name
    assert found.decoder is not None and derived.decoder is not None
    assert found.decoder.numbers_per_row == pytest.approx(derived.decoder.numbers_per_row, rel=0.02)
    assert found.decoder.flops_per_row == pytest.approx(derived.decoder.flops_per_row, rel=1e-3)
