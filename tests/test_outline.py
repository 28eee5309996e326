"""What plans know of FLUX's and Wan's sizes without model libraries, against the models themselves."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.adapter import PipelineAdapter
from branchtree_adapters.pipeline.outline import find_sizes, known, read_outline
from branchtree_adapters.pipeline.sources import locate_pipeline
from branchtree_adapters.wan import Wan
from branchtree_adapters.wan_layout import WanConfig
from branchtree_rewards.shared.source import bundled_json
from guests import run_code
from tiny_flux import tiny_flux

from branchtree.errors import ModelError

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "adapters" / "branchtree_adapters" / "assets" / "digits_flux"


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_sizes", ROOT / "scripts" / "build_sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_components_is_that_of_the_installed_libraries(builder: ModuleType) -> None:
    found = json.loads(json.dumps(builder.component_sizes()))
    assert found["pipelines"] == known()["pipelines"]
    assert found["classes"].keys() == known()["classes"].keys()
    for name, facts in known()["classes"].items():
        here = found["classes"][name]
        assert here["sizes"] == facts["sizes"]
        shared = here["defaults"].keys() & facts["defaults"].keys()  # a version may have more arguments than another
        assert {key: here["defaults"][key] for key in shared} == {key: facts["defaults"][key] for key in shared}
        assert set(facts["deciding"]) <= facts["defaults"].keys()


def test_the_list_of_reward_networks_is_that_of_the_installed_libraries(builder: ModuleType) -> None:
    assert builder.published_parameters() == bundled_json("published_parameters.json")


FREE = {
    "FluxTransformer2DModel": {"axes_dims_rope"},
    "WanTransformer3DModel": {"eps", "rope_max_seq_len"},
    "AutoencoderKL": {
        *("act_fn", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor", "latents_mean"),
        *("latents_std", "force_upcast"),
    },
    "AutoencoderKLWan": {
        *("dropout", "latents_mean", "latents_std", "scale_factor_temporal", "scale_factor_spatial"),
    },
}
"""Arguments that no size depends on: positions, constants of a computation, and how numbers are scaled."""


@pytest.mark.parametrize("name", FREE)
def test_every_other_argument_decides(name: str) -> None:
    facts = known()["classes"][name]
    assert facts["defaults"].keys() - set(facts["deciding"]) == FREE[name]


MODELS: dict[str, Callable[[], PipelineAdapter]] = {
    "flux": lambda: Flux(FluxConfig(path="black-forest-labs/FLUX.1-dev", height=512, width=1024)),
    "someone's flux": lambda: Flux(FluxConfig(path="someone/flux", max_sequence_length=128)),
    "digits": lambda: Flux(FluxConfig(path="bundled:digits_flux", height=24, width=16)),
    "image to video": lambda: Wan(WanConfig(path="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", frames=41)),
    "text to video": lambda: Wan(
        WanConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", task="text_to_video", guidance=1, height=512, width=512)
    ),
    "moving digits": lambda: Wan(WanConfig(path="bundled:moving_digits_wan", height=32, width=48, frames=5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_footprint_is_that_of_the_built_model(name: str) -> None:
    quick, built = MODELS[name](), MODELS[name]()
    assert quick._outline is not None
    built.__dict__["_found_outline"] = None
    assert quick.footprint() == built.footprint()
    assert json.dumps(quick.configs, sort_keys=True) == json.dumps(built.configs, sort_keys=True)


def changed(folder: Path, file: str, changes: dict[str, Any]) -> Flux:
    shutil.copytree(BUNDLED, folder)
    (folder / "SHA256SUMS").unlink()
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return Flux(FluxConfig(path=str(folder), height=16, width=16))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("transformer/config.json", {"num_single_layers": 2}),
        ("text_encoder/config.json", {"vocab_size": 99}),
        ("vae/config.json", {"layers_per_block": 2}),
    ],
)
def test_a_model_of_other_sizes_is_built(file: str, changes: dict[str, Any], tmp_path: Path) -> None:
    known_one = Flux(FluxConfig(path="bundled:digits_flux", height=16, width=16))
    other = changed(tmp_path / "model", file, changes)
    assert other._outline is None
    before, after = known_one.footprint(), other.footprint()
    numbers = [(each.denoiser_parameters, each.frozen_parameters) for each in (before, after)]
    assert numbers[0] != numbers[1]
    assert other.configs == other.blueprint.configs


def test_settings_that_no_size_depends_on_are_read(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", "vae/config.json", {"scaling_factor": 0.5, "_class_name": "AutoencoderKL"})
    assert model._outline is not None
    assert model.configs["vae/config.json"]["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer": ["diffusers", "SD3Transformer2DModel"]},
        {"vae": [None, None]},
        {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
    ],
)
def test_a_pipeline_of_other_components_is_built(changes: dict[str, Any], tmp_path: Path) -> None:
    assert changed(tmp_path / "model", "model_index.json", changes)._outline is None


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", "vae/config.json", {})
    (tmp_path / "model" / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        model.footprint()


def test_what_is_not_listed_has_no_outline(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "tiny")
    assert read_outline("FluxPipeline", locate_pipeline(str(folder)), [], None) is None
    assert read_outline("PixArtSigmaPipeline", locate_pipeline(str(folder)), [], None) is None
    assert read_outline("FluxPipeline", locate_pipeline("some/model"), [], None) is None
    assert find_sizes("T5EncoderModel", {}) is None


class OtherLayers(Flux):
    """A FLUX of which other layers are trained."""

    lora_targets = ("attn.to_q",)


class OtherSizes(Flux):
    """A FLUX that counts for itself."""

    def sizes(self, denoiser: Any) -> Any:
        return super().sizes(denoiser)


@pytest.mark.parametrize("kind", [OtherLayers, OtherSizes])
def test_a_class_with_sizes_of_its_own_is_built(kind: type[Flux]) -> None:
    assert kind(FluxConfig(path="bundled:digits_flux", height=16, width=16))._outline is None


def test_plans_of_flux_and_wan_import_no_model_library() -> None:
    done = run_code(
        """
        import sys
        from branchtree import plan
        from branchtree.cli.console import make_console
        from branchtree.cli.display import print_plan

        for name in ("quickstart", "wan_quickstart", "flux_t2i_branchgrpo", "wan_i2v_motion", "ocr_quickstart"):
            print_plan(make_console(), plan(name))
        heavy = ("diffusers", "transformers", "peft", "accelerate", "matplotlib", "torch.distributed.fsdp")
        print([name for name in (*heavy, "torch.utils.flop_counter") if name in sys.modules], file=sys.stderr)
        """,
        fresh=True,
    )
    assert done.code == 0, done.err
    assert done.out.count("Denoiser work") == 5
    assert done.err.splitlines()[-1] == "[]"
