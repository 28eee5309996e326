"""The model family ``diffusers``: every promise of an adapter, on pipelines of many kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.small.pipelines import PIPELINES
from pipeline_checks import case_of
from small_pipelines import options, small_constants

from branchtree import load_recipe, train
from branchtree.errors import ModelError
from branchtree.recipe.schema import Recipe
from branchtree.run.directory import METRICS
from branchtree.testing import AdapterCase, ModelAdapterPromises

PROMISED = ["flux", "aura_flow", "z_image", "sdxl", "wan_experts", "wan_image"]
"""Families of each kind: without guidance and with it, one call per noise level, lists in place of batches, a U-Net
that predicts noise, two denoisers, and videos of images. BRANCHTREE_ALL_FAMILIES=1 takes all."""
FAMILIES = list(PIPELINES) if os.environ.get("BRANCHTREE_ALL_FAMILIES") else PROMISED
SMALL = {"run.iterations": 2, "run.sample_prompts": 1, "tree.steps": 6, "tree.splits": [0, 2], "evaluation": None}


@pytest.mark.filterwarnings("ignore:In CPU autocast")
class TestPromises(ModelAdapterPromises):
    @pytest.fixture(scope="class", params=FAMILIES)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterCase]:
        family = PIPELINES[request.param]
        with small_constants(family):
            yield case_of(family, options(request.param), tmp_path_factory.mktemp(request.param))


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
    changes = {"batch.prompts": 1, "model.guidance": 4.0, "optim.warmup": 0}
    recipe = load_recipe("wan_quickstart", {**SMALL, **changes})
    first, second = both_metrics(recipe, {"guidance_scale": 4.0, "max_sequence_length": 12}, tmp_path)
    for own, driven in zip(first.splitlines(), second.splitlines(), strict=True):
        assert json.loads(driven) == pytest.approx(json.loads(own), rel=1e-4, abs=1e-4, nan_ok=True)
