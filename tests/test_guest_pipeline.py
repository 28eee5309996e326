"""A stranger's adapter of a diffusers pipeline, written with public names alone: promises, pipeline, training."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from guests import GUEST
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from branchtree import plan, train
from branchtree.errors import ModelError
from branchtree.plugins import Condition
from branchtree.recipe.build import make_model
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.testing import AdapterCase, ModelAdapterPromises

CPU = torch.device("cpu")
SIZE, STEPS, GUIDANCE = 16, 4, 3.0
PROMPTS = ["a red three", "seven blue", "a digit"]


def tiny_sd3(folder: Path) -> Path:
    """Write a complete StableDiffusion3Pipeline folder of random weights, and return it."""
    settings = {**tiny_flux._clip_config().to_dict(), "projection_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pooled_projection_dim=24,
                pos_embed_max_size=8,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flux._vae(),
            text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**settings)).eval(),
            tokenizer=tiny_flux._clip_tokenizer(folder / "clip_files"),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**settings)).eval(),
            tokenizer_2=tiny_flux._clip_tokenizer(folder / "clip_files_2"),
            text_encoder_3=T5EncoderModel(tiny_flux._t5_config()).eval(),
            tokenizer_3=tiny_flux.t5_tokenizer(folder / "t5_files"),
        )
        torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.1)
        pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def plugged(guest_site: Path) -> Iterator[None]:
    from branchtree.plugins.registry import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(guest_site)
        registry.cache_clear()
        yield
    registry.cache_clear()


@pytest.fixture(scope="module")
def case(folder: Path, plugged: None) -> AdapterCase:
    model = {"adapter": "guest_sd3", "path": str(folder), "height": SIZE, "width": SIZE, "guidance": GUIDANCE}
    return AdapterCase(
        model=model, reward={"reward": "guest_brightness"}, prompts=PROMPTS, overrides={"sampler.grid": "pipeline"}
    )


class TestSD3(ModelAdapterPromises):
    """What any model promises."""


@pytest.fixture(scope="module")
def adapter(case: AdapterCase) -> Any:
    adapter = make_model(case.recipe())
    adapter.load(CPU, torch.float32, torch.float32)
    return adapter


@torch.no_grad()
def rollout(adapter: Any) -> Tensor:
    noise = torch.stack([adapter.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)])
    latents, conditioning = noise, adapter.encode([Condition(prompt) for prompt in PROMPTS[:2]])
    for here, there in itertools.pairwise(adapter.sigmas(STEPS)):
        latents = latents + (there - here) * adapter.predict(latents, here.expand(2), conditioning)
    return latents


def test_a_rollout_is_the_pipelines(adapter: Any, folder: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS[:2],
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="pt",
    ).images
    assert (adapter.decode(rollout(adapter)).pixels - images).abs().max() <= 1e-5


@pytest.mark.parametrize("lora", [True, False])
def test_it_trains_for_two_iterations(case: AdapterCase, folder: Path, tmp_path: Path, lora: bool) -> None:
    recipe = case.recipe({"optim.lr": 1e-2}, lora=lora)
    planned = plan(recipe)
    train(recipe, output=tmp_path / "run")
    rows = RunDirectory(tmp_path / "run").rows(METRICS)
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["ratio/max_deviation"] >= 0 for row in rows)
    assert (planned.rollout_rows, planned.gradient_rows) == (rows[0]["rows/rollout"], rows[0]["rows/gradient"])
    before = StableDiffusion3Pipeline.from_pretrained(folder)
    after = before if lora else StableDiffusion3Pipeline.from_pretrained(tmp_path / "run" / "final")
    if lora:
        after.load_lora_weights(tmp_path / "run" / "final")
        assert any("lora" in name for name in after.transformer.state_dict())
    else:
        changed = after.transformer.state_dict()
        assert any(not torch.equal(value, changed[name]) for name, value in before.transformer.state_dict().items())


def test_sizes_that_are_not_known_are_refused(case: AdapterCase) -> None:
    with pytest.raises(ModelError, match="configuration files of 'org/none' cannot be read; check the hub id"):
        case.build(path="org/none").footprint()


def test_the_adapter_is_short_and_imports_public_names_alone() -> None:
    code = (GUEST / "branchtree_guest" / "sd3.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) < 60
    imported = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert imported == {"branchtree_adapters", "branchtree.plugins", "torch"}
