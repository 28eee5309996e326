"""The model family ``diffusers``: every promise of an adapter, on pipelines of many kinds."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.any_pipeline.linear_inputs import make_contiguous
from branchtree_adapters.pipeline.sources import _small, locate_pipeline
from branchtree_adapters.small.pipelines import PIPELINES
from pipeline_checks import case_of, planned_with_weights
from small_pipelines import options, small_constants
from torch import distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from branchtree import load_recipe, plan, train
from branchtree.errors import ModelError, RecipeError
from branchtree.plugins import Condition
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import METRICS
from branchtree.testing import AdapterCase, LoadingPromises, SamplingPromises, WeightPromises
from branchtree.testing.probe import CPU

PROMPTS = ["a red three", "seven blue", "a digit"]
ALL_FAMILIES = "BRANCHTREE_ALL_FAMILIES" in os.environ
SAMPLED = list(PIPELINES) if ALL_FAMILIES else ["sd15", "wan_experts", "z_image"]
"""Families of each kind: a U-Net that predicts noise, two transformers, lists in place of batches.
BRANCHTREE_ALL_FAMILIES=1 takes all; what each gives is held by test_any_pipeline.py and test_every_pipeline.py."""
STORED = list(PIPELINES) if ALL_FAMILIES else ["sd15", "wan_experts"]
"""Those that are loaded, saved, restored and exported in ways of their own."""
ROUNDING = {name: {torch.float32: 1e-4, torch.bfloat16: 5e-2} for name in ("kandinsky5", "kandinsky5_video")}
"""By family, how far a row may differ between batches where the bare transformer itself, given the same row alone and
beside another, differs by 2e-5 of the largest number, which guidance multiplies."""
MOCHI = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # its float32 regions
SMALL = {"run.iterations": 2, "run.sample_prompts": 1, "tree.steps": 6, "tree.splits": [0, 2], "evaluation": None}


@contextmanager
def promised(name: str, folder: Path, *, weights: bool) -> Iterator[AdapterCase]:
    """A context for the promises of a family; ``weights`` says whether it is planned on a pipeline that has them."""
    family = PIPELINES[name]
    with small_constants(family), planned_with_weights(family) if weights else nullcontext():
        case = case_of(family, options(name), folder)
        yield replace(case, tolerance=ROUNDING.get(name, case.tolerance))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
class TestLoading(LoadingPromises):
    @pytest.fixture(scope="class", params=STORED)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterCase]:
        with promised(request.param, tmp_path_factory.mktemp(request.param), weights=False) as case:
            yield case


@pytest.mark.filterwarnings("ignore:In CPU autocast")
class TestSampling(SamplingPromises):
    @pytest.fixture(scope="class", params=SAMPLED)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterCase]:
        with promised(request.param, tmp_path_factory.mktemp(request.param), weights=True) as case:
            yield case


@pytest.mark.filterwarnings("ignore:In CPU autocast")
class TestWeights(WeightPromises):
    @pytest.fixture(scope="class", params=STORED)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterCase]:
        with promised(request.param, tmp_path_factory.mktemp(request.param), weights=True) as case:
            yield case


@pytest.mark.parametrize("pipeline", ["GlmImagePipeline", "HiDreamImagePipeline"])
def test_what_cannot_be_trained_is_refused_by_its_class(pipeline: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    model = Diffusers(DiffusersConfig(path=str(tmp_path), height=32, width=32))
    with pytest.raises(ModelError, match=f"{pipeline} cannot be trained: its "):
        model.footprint()


def both_metrics(recipe: Recipe, call: Mapping[str, Any], folder: Path) -> list[bytes]:
    """What a run of the recipe measures, and a run whose model is driven through the pipeline's own call."""
    options = recipe.model.options
    sizes = {name: options[name] for name in ("path", "height", "width", "frames", "fps") if name in options}
    driven = type(recipe.model)(**{"adapter": "diffusers", "call": call, **sizes})
    train(recipe, output=folder / "own")
    train(recipe.model_copy(update={"model": driven}), output=folder / "driven")
    return [(folder / name / METRICS).read_bytes() for name in ("own", "driven")]


def test_the_quickstart_is_that_of_the_hand_written_adapter(tmp_path: Path) -> None:
    """To the byte."""
    call = {"guidance_scale": 0.0, "max_sequence_length": 8}  # of T5: as many as its tokenizer takes
    first, second = both_metrics(load_recipe("quickstart", SMALL), call, tmp_path)
    assert first == second


def test_the_video_quickstart_is_that_of_the_hand_written_adapter(tmp_path: Path) -> None:
    """Guidance included: the pipeline's call sends its two rows through the model one after the other."""
    changes = {"batch.prompts": 1, "model.guidance": 4.0, "optim.warmup": 0, "tree.steps": 4, "run.iterations": 1}
    recipe = load_recipe("wan_quickstart", {**SMALL, **changes})
    first, second = both_metrics(recipe, {"guidance_scale": 4.0, "max_sequence_length": 12}, tmp_path)
    for own, driven in zip(first.splitlines(), second.splitlines(), strict=True):
        assert json.loads(driven) == pytest.approx(json.loads(own), rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", ["wan_image_expanded", "qwen_edit_plus_two"])
def test_a_model_is_loaded_as_it_was_planned(name: str) -> None:
    """So are the first of each class: test_phantom.py plans them as they are, and test_every_pipeline.py loads them."""
    with small_constants(PIPELINES[name]):
        model = Diffusers(DiffusersConfig(**options(name)))
        planned = model.latent_shape, model.rows_per_prediction, model.driver.example.keys()
        model.load(torch.device("cpu"), torch.float32, torch.float32)
    assert (model.latent_shape, model.rows_per_prediction, model.driver.example.keys()) == planned
    assert model.encoding_fingerprint() is not None


@MOCHI
@pytest.mark.parametrize("name", ["qwen_image", "ltx", "mochi"])
def test_a_schedule_that_diffusers_divides_by_zero_for_is_one_step_from_its_start(name: str) -> None:
    model = Diffusers(DiffusersConfig(**options(name)))
    with pytest.raises((ArithmeticError, RuntimeWarning)):
        model.driver.grid(1)
    assert model.sigmas(1).tolist() == [1, 0]
    assert model.sigmas(2)[0] == model.sigmas(20)[0] == 1


def test_a_grid_that_the_scheduler_does_not_make_is_refused() -> None:
    """Its model has 1000 noise levels."""
    model = Diffusers(DiffusersConfig(**options("sd15")))
    with pytest.raises(ModelError, match=r"makes no grid of 1001 steps: .*Set other tree\.steps"):
        model.sigmas(1001)


def test_a_grid_that_begins_at_pure_noise_is_refused_of_a_model_that_predicts_it() -> None:
    sections = {"model": {"adapter": "diffusers", **options("sd15")}, "rewards": [{"reward": "digits"}]}
    recipe = Recipe.model_validate({**sections, "data": {"prompts": PROMPTS}, "sampler": {"kind": "ddim"}, "name": "a"})
    with pytest.raises(RecipeError, match=r"sampler\.grid: 'linear' begins at pure noise.* set it to pipeline"):
        plan(recipe)


def test_a_layer_computes_the_same_with_trained_and_with_frozen_weights() -> None:
    """As the one of Krea 2 over its encoder's layers, whose input is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(4, 208, 2, 32, generator=generator).transpose(2, 3)
    layer, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    make_contiguous([layer, other], lambda: (layer(given), other(given.contiguous())))
    assert not other._forward_pre_hooks
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(layer(given), frozen(given))
        assert torch.equal(layer(given), layer(given.contiguous()))


def test_checkpointed_blocks_are_given_what_others_are() -> None:
    """Also the mask, which diffusers leaves out of Chroma's checkpointed blocks; asked for twice, they are so once."""
    model = Diffusers(DiffusersConfig(**options("chroma")))
    model.load(CPU, torch.float32, torch.float32)
    conditioning = model.encode([Condition("one"), Condition("two words of several letters")])
    latents = torch.stack([model.initial_noise(torch.Generator().manual_seed(seed)) for seed in range(2)])
    predictions, saved = [], []
    for _ in range(3):
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(partial(_counted, saved), lambda tensor: tensor):
            predictions.append(model.predict(latents, torch.tensor([0.9, 0.4]), conditioning))
        model.enable_gradient_checkpointing()
    assert torch.equal(predictions[0], predictions[1]) and torch.equal(predictions[0], predictions[2])
    assert saved[1] < saved[0] / 2 and saved[2] == saved[1]


def _counted(saved: list[int], tensor: torch.Tensor) -> torch.Tensor:
    saved[-1] += tensor.numel()
    return tensor


def test_a_call_that_lacks_an_image_is_refused() -> None:
    model = Diffusers(DiffusersConfig(**{**options("ltx_image"), "images": None}))
    with pytest.raises(ModelError, match="images among them"):
        model.latent_shape  # noqa: B018


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("num_inference_steps", r"num_inference_steps has a key of its own: set tree\.steps instead\."),
        ("negative_prompt", r"negative_prompt has a key of its own: set model\.negative_prompt instead\."),
        ("latents", r"latents is set by the library; leave it out\."),
        ("guidance_scal", r"guidance_scal is not taken by LTXPipeline; did you mean 'guidance_scale'\?"),
    ],
)
def test_a_keyword_that_cannot_be_given_says_what_can(keyword: str, message: str) -> None:
    family = options("ltx")
    model = Diffusers(DiffusersConfig(**{**family, "call": {**family["call"], keyword: 1}}))
    with pytest.raises(ModelError, match=rf"model\.call\.{message}"):
        model.call  # noqa: B018


def test_the_small_pipeline_of_the_page_on_new_models_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a LoRA that is learnt, and goes into the pipeline's own loader."""
    page = (Path(__file__).parents[1] / "docs" / "models" / "new.md").read_text(encoding="utf-8")
    build = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "save_pretrained" in code)
    recipe = next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "./small-cogvideox" in text)
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(build, {})
    overrides = {"rewards": [{"reward": "motion_smoothness"}], "run.iterations": 1, "run.sample_prompts": 1}
    train("mine.yaml", {**overrides, "tree.steps": 4}, output=tmp_path / "run")
    (metrics,) = map(json.loads, (tmp_path / "run" / METRICS).read_text().splitlines())
    assert metrics["grad_norm"] > 0
    pipeline: Any = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "small-cogvideox")
    pipeline.load_lora_weights(tmp_path / "run" / "final")
    assert pipeline.get_active_adapters()


def test_each_process_has_a_small_pipeline_of_its_own() -> None:
    """Also one that is not the first of several."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    _small.cache_clear()
    try:
        folder = locate_pipeline("small:sd3").folder
    finally:
        dist.destroy_process_group()
    assert folder is not None
    assert all((folder / name / "config.json").is_file() for name in ("transformer", "vae", "text_encoder_3"))
