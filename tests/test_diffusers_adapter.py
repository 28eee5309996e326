"""The model family ``diffusers``: every promise of an adapter, on pipelines of many kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from branchtree_adapters.small.pipelines import PIPELINES, Small

from branchtree import load_recipe, train
from branchtree.run.directory import METRICS
from branchtree.testing import AdapterCase, ModelAdapterPromises

PROMPTS = ["a red three", "seven blue", "a digit"]
PROMISED = ["flux", "aura_flow", "sdxl", "wan_experts"]
"""Families of each kind: without guidance, one call per noise level, a U-Net that predicts noise, two transformers."""
SMALL = {"run.iterations": 2, "run.sample_prompts": 1, "tree.steps": 6, "tree.splits": [0, 2], "evaluation": None}


def section(family: Small, folder: Path) -> dict[str, Any]:
    """The section ``model`` for a family's small pipeline, which is written to ``folder``."""
    family.build().save_pretrained(folder)
    sizes = {"height", "width", "num_frames"}
    model = {
        "adapter": "diffusers",
        "path": str(folder),
        "height": family.call["height"],
        "width": family.call["width"],
        "negative_prompt": family.negative,
        "call": {name: value for name, value in family.call.items() if name not in sizes},
    }
    return {**model, "frames": family.call["num_frames"]} if "num_frames" in family.call else model


class TestPromises(ModelAdapterPromises):
    @pytest.fixture(scope="class", params=PROMISED)
    def case(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdapterCase:
        folder = tmp_path_factory.mktemp(request.param)
        return AdapterCase(
            model=section(PIPELINES[request.param], folder / "pipeline"), reward={"reward": "digits"}, prompts=PROMPTS
        )


def test_the_quickstart_is_that_of_the_hand_written_adapter(tmp_path: Path) -> None:
    """To the byte."""
    recipe = load_recipe("quickstart", SMALL)
    sizes = {"height": recipe.model.options["height"], "width": recipe.model.options["width"]}
    call = {"guidance_scale": 0.0, "max_sequence_length": 8}  # of T5: as many as its tokenizer takes
    model = {"adapter": "diffusers", "path": recipe.model.options["path"], **sizes, "call": call}
    train(recipe, output=tmp_path / "flux")
    train(recipe.model_copy(update={"model": type(recipe.model)(**model)}), output=tmp_path / "diffusers")
    first, second = ((tmp_path / name / METRICS).read_bytes() for name in ("flux", "diffusers"))
    assert first == second
