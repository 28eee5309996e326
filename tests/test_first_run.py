"""A first run's downloads: in which order they come, what refuses them, and the page that lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from branchtree_adapters.pipeline.blueprint import TRANSFORMER, VAE
from branchtree_adapters.pipeline.components import INDEX
from branchtree_adapters.wan import Wan
from branchtree_adapters.wan_layout import WanConfig
from diffusers import WanImageToVideoPipeline

from branchtree.errors import ModelError
from branchtree.plugins.registry import registry
from branchtree.recipe import load_recipe, recipe_names
from branchtree.recipe.build import make_model
from branchtree.recipe.load import builtin_folder

ROOT = Path(__file__).parents[1]
PAGE, MODELS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("first_run.md", "models.md"))


class Hub:
    """Stands for the hub's client: writes files into its cache as a download would."""

    def __init__(self, cache: Path, files: Mapping[str, Any]) -> None:
        self._cache, self._files = cache, files
        self.asked: list[str] = []

    def download(self, repository: str, name: str, revision: str | None = None) -> str:
        self.asked.append(name)
        if name not in self._files:
            raise ConnectionError(f"no {name}")
        folder = self._cache / f"models--{repository.replace('/', '--')}"
        file = folder / "snapshots" / ("a" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self._files[name]), encoding="utf-8")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("a" * 40, encoding="utf-8")
        return str(file)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What asked for weights, which none gets."""
    asked: list[object] = []

    def refuse(location: object, **_: object) -> None:
        asked.append(location)
        raise ConnectionError("no weights today")

    monkeypatch.setattr(WanImageToVideoPipeline, "download", refuse)
    return asked


SECOND = {
    INDEX: {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9},
    TRANSFORMER: {"in_channels": 36},
    VAE: {"z_dim": 16},
}
TEXT_ONLY = {INDEX: {}, TRANSFORMER: {"in_channels": 16}, VAE: {"z_dim": 16}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (SECOND, "is a Wan2.2 model"),
        (TEXT_ONLY, r"takes 16 input channels, and image_to_video needs 36; set task to 'text_to_video'"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(
    files: Mapping[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: list[object]
) -> None:
    hub = Hub(tmp_path, {**files, "text_encoder/config.json": {}})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = Wan(WanConfig(path="org/model"))
    with pytest.raises(ModelError, match=message):
        model.load(torch.device("cpu"), torch.float32, torch.float32)
    assert INDEX in hub.asked
    assert no_weights == []


def test_without_a_network_the_weights_say_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: list[object]
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(tmp_path, {}).download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no weights today.*licence is accepted.*logged in \(hf auth login\)"):
        Wan(WanConfig(path="org/model")).load(torch.device("cpu"), torch.float32, torch.float32)
    assert no_weights == ["org/model"]


# The page about it


def test_the_page_lists_every_download() -> None:
    for name in recipe_names([builtin_folder()]):
        recipe = load_recipe(name)
        path = str(recipe.model.options["path"])
        if path.startswith("bundled:"):
            continue
        assert f"`{path}`" in PAGE + MODELS, name
        rewards = [*recipe.rewards, *(recipe.evaluation.rewards if recipe.evaluation else ())]
        for reward in rewards:
            card = registry().reward(reward.reward).card
            assert card is not None
            assert f"| `{reward.reward}`" in PAGE
            assert f"`{re.split('[,:] ', card.checkpoint)[0]}`" in PAGE
            if card.size is not None:
                row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{reward.reward}`"))
                assert row.endswith(f"| {card.size / 1e9:.1f} |")


@pytest.mark.parametrize("name", ["flux_t2i_branchgrpo", "wan_i2v_motion", "wan_i2v_14b_motion", "wan_t2v_motion"])
def test_the_page_counts_the_parameters_of_the_architectures(name: str) -> None:
    recipe = load_recipe(name)
    sizes = make_model(recipe).footprint()
    rows = PAGE.split(f"`{recipe.model.options['path']}`: transformer | ")[1].split("together | ")
    transformer, together = (float(part.split(" B |")[0]) for part in rows[:2])
    assert transformer == pytest.approx(sizes.denoiser_parameters / 1e9, abs=0.005)
    assert together == pytest.approx((sizes.denoiser_parameters + sizes.frozen_parameters) / 1e9, abs=0.005)
