"""Published models of diffusers: their configurations, the sizes that plans have of them, and their recipes.

Sizes are compared with modules that are built here from the classes themselves, and with arithmetic written out here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import transformers
from branchtree_adapters.any_pipeline.adapter import Diffusers, DiffusersConfig
from branchtree_adapters.any_pipeline.published import PublishedModel, published_model, published_models
from branchtree_adapters.pipeline.blueprint import Blueprint, count_parameters
from branchtree_adapters.pipeline.components import INDEX
from branchtree_adapters.pipeline.sources import ModelSource
from diffusers.pipelines import ltx2
from pipeline_checks import planned_with_weights
from shipped_recipes import DRIVEN, ON_GPU, constants_of, small_family
from training_runs import metrics

from branchtree import load_recipe, plan, train
from branchtree.recipe import recipe_names
from branchtree.recipe.build import make_model
from branchtree.recipe.load import builtin_folder

ROOT = Path(__file__).parents[1]
EVERY = pytest.mark.parametrize("model", published_models(), ids=lambda model: str(model.name))


@pytest.fixture(scope="module")
def kept() -> Iterator[ModuleType]:
    """The script that measures models and keeps their sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("build_models")
    sys.modules.pop("build_models", None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the hub is asked for a model that the table has."""

    def ask(source: ModelSource, names: Any) -> None:
        assert source.folder is not None, "the hub was asked"

    for module in ("pipeline.blueprint", "any_pipeline.adapter"):
        monkeypatch.setattr(f"branchtree_adapters.{module}.fetch_configs", ask)


# The table


def test_no_hub_id_is_listed_twice() -> None:
    ids = [each for model in published_models() for each in model.ids]
    assert len(ids) == len({*ids})


@EVERY
def test_configurations_have_keys_of_their_classes_alone(model: PublishedModel) -> None:
    adapter = Diffusers(DiffusersConfig(path=model.ids[0], height=1024, width=1024))
    pipeline = getattr(diffusers, model.pipeline)
    parameters = inspect.signature(pipeline.__init__).parameters
    assert adapter.pipeline_class == model.pipeline
    for file, config in model.files.configs.items():
        if file == INDEX:
            assert config.keys() - {"_class_name"} <= parameters.keys()
            continue
        name = file.partition("/")[0]
        assert name in parameters
        if name in adapter.blueprint.classes:
            kind = adapter.blueprint.classes[name]
            known = getattr(kind, "config_class", None)
            keys = inspect.signature(kind.__init__).parameters if known is None else known().to_dict()
            assert config.keys() <= keys.keys(), file


def test_a_model_that_is_not_in_the_cache_is_told_apart_by_its_source() -> None:
    adapter = Diffusers(DiffusersConfig(path="Qwen/Qwen-Image", height=1024, width=1024))
    assert not adapter.blueprint.assumed
    assert adapter.blueprint.origin == (
        "assumed to be those of Qwen-Image, since 'Qwen/Qwen-Image' is not in the local cache (from the defaults of "
        "diffusers' classes, and its scheduler_config.json as other projects have it)"
    )


def test_a_model_that_is_not_in_the_table_is_asked_for() -> None:
    with pytest.raises(AssertionError, match="the hub was asked"):
        Diffusers(DiffusersConfig(path="some-org/some-model", height=64, width=64)).footprint()


# Sizes, by classes and arithmetic of this file's own; what several models have is built once, without memory


@cache
def t5(kind: str = "T5", **changes: Any) -> Any:
    sizes = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{kind}EncoderModel")(config)


@cache
def clip(kind: str = "CLIPTextModelWithProjection", *, large: bool = False) -> Any:
    sizes = (1280, 5120, 32, 20) if large else (768, 3072, 12, 12)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.CLIPTextConfig(**dict(zip(names, sizes, strict=True)), projection_dim=sizes[0])
    return getattr(transformers, kind)(config)


QWEN25 = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@cache
def qwen25_vl() -> Any:
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN25, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@cache
def qwen3(kind: str) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_key_value_heads=8, tie_word_embeddings=True
    )
    return getattr(transformers, kind)(config)


@cache
def gemma3() -> Any:
    text = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 8},
        vision_config={**vision, "image_size": 896, "patch_size": 14, "vision_use_head": False},
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@cache
def qwen3_vl() -> Any:
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [5, 11, 17]}
    )
    return transformers.Qwen3VLModel(config)


@cache
def large_qwen3_vl() -> Any:
    text = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})
    return transformers.Qwen3VLForConditionalGeneration(config)


@cache
def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config())


@cache
def kl(latents: int, widths: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, attention: bool = True) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=layers,
        latent_channels=latents,
        use_quant_conv=latents == 4,
        use_post_quant_conv=latents == 4,
        mid_block_add_attention=attention,
    )


def kandinsky5(**sizes: Any) -> Any:
    return diffusers.Kandinsky5Transformer3DModel(in_visual_dim=16, out_visual_dim=16, num_text_blocks=2, **sizes)


def square(width: int, layers: int) -> int:
    """LoRA parameters for each rank of linear layers that keep a width."""
    return layers * 2 * width


def attended(width: int, text: int, blocks: int) -> int:
    """LoRA parameters for each rank of a U-Net's blocks, which attend to themselves and to a text."""
    return blocks * (square(width, 6) + 2 * (text + width))


@dataclass(frozen=True)
class Expected:
    """What a plan has to say of a recipe's model."""

    denoiser: Callable[[], Any]
    frozen: Callable[[], list[Any]]
    latents: tuple[int, ...]
    rows: int
    lora: int  # parameters for each rank


SANA_VAE = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
EXPECTED: dict[str, Expected] = {
    "sd35_t2i_branchgrpo": Expected(
        lambda: diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        lambda: [kl(16), clip(), clip(large=True), t5()],
        (16, 1024 // 8, 1024 // 8),
        2,
        square(1536, 24 * 8 - 1 + 13 * 4),  # the last block gives no text
    ),
    "qwen_image_t2i_branchgrpo": Expected(
        diffusers.QwenImageTransformer2DModel,
        lambda: [diffusers.AutoencoderKLQwenImage(), qwen25_vl()],
        (64 * 64, 16 * 4),
        2,
        square(24 * 128, 60 * 8 - 1),  # the last block's text goes nowhere
    ),
    "qwen_image_21_t2i_branchgrpo": Expected(
        diffusers.QwenImage21Transformer2DModel,
        lambda: [diffusers.AutoencoderKLQwenImage21(), large_qwen3_vl()],
        (64 * 64, 64),
        1,
        square(32 * 128, 32 * 4),
    ),
    "z_image_t2i_branchgrpo": Expected(
        diffusers.ZImageTransformer2DModel,
        lambda: [kl(16), qwen3("Qwen3Model")],
        (16, 128, 128),
        2,
        square(3840, (30 + 2 + 2) * 4),
    ),
    "klein_t2i_branchgrpo": Expected(
        lambda: diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        lambda: [diffusers.AutoencoderKLFlux2(), qwen3("Qwen3ForCausalLM")],
        (64 * 64, 32 * 4),
        2,
        # A single block has one layer to queries, keys, values and a gated feed-forward of three widths, and one back.
        square(3072, 5 * 8) + 20 * ((1 + 3 + 2 * 3) * 3072 + (1 + 3 + 1) * 3072),
    ),
    "kandinsky5_t2i_branchgrpo": Expected(
        lambda: kandinsky5(model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48)),
        lambda: [kl(16), qwen25_vl(), clip("CLIPTextModel")],
        (1, 1024 // 8, 1024 // 8, 16),
        2,
        # A text's two blocks attend to themselves, the others also to the text.
        square(2560, 2 * 4 + 50 * 8),
    ),
    "kandinsky5_t2v_branchgrpo": Expected(
        lambda: kandinsky5(model_dim=1792, ff_dim=7168, num_visual_blocks=32, visual_cond=True),
        lambda: [diffusers.AutoencoderKLHunyuanVideo(), qwen25_vl(), clip("CLIPTextModel")],
        ((121 - 1) // 4 + 1, 512 // 8, 768 // 8, 16),
        2,
        square(1792, 2 * 4 + 32 * 8),
    ),
    "flux_kontext_edit_branchgrpo": Expected(
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        lambda: [kl(16), clip("CLIPTextModel"), t5()],
        (64 * 64, 16 * 4),
        1,
        square(3072, 19 * 8 + 38 * 3),
    ),
    "chroma_t2i_branchgrpo": Expected(
        diffusers.ChromaTransformer2DModel,
        lambda: [kl(16), t5()],
        (64 * 64, 16 * 4),
        2,
        square(3072, 19 * 8 + 38 * 3),
    ),
    "sana_t2i_branchgrpo": Expected(
        diffusers.SanaTransformer2DModel,
        lambda: [diffusers.AutoencoderDC(**SANA_VAE), gemma()],
        (32, 1024 // 32, 1024 // 32),
        2,
        square(2240, 20 * 8),
    ),
    "krea2_t2i_branchgrpo": Expected(
        diffusers.Krea2Transformer2DModel,
        lambda: [diffusers.AutoencoderKLQwenImage(), qwen3_vl()],
        (64 * 64, 16 * 4),
        2,
        # Keys and values have a quarter of the heads; text goes through four blocks of its own.
        square(6144, 28 * 2) + 28 * 2 * (6144 + 6144 // 4) + square(2560, (2 + 2) * 4),
    ),
    "lumina2_t2i_branchgrpo": Expected(
        lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304),
        lambda: [kl(16), gemma()],
        (16, 128, 128),
        2,
        (26 + 2 + 2) * (2 * (2304 + 2304) + 2 * (2304 + 8 * 96)),  # 8 heads of 24 for keys and values
    ),
    "ltx_t2v_branchgrpo": Expected(
        diffusers.LTXVideoTransformer3DModel,
        lambda: [diffusers.AutoencoderKLLTXVideo(), t5()],
        (((161 - 1) // 8 + 1) * (480 // 32) * (704 // 32), 128),
        2,
        square(2048, 28 * 8),
    ),
    "ltx2_t2v_branchgrpo": Expected(
        diffusers.LTX2VideoTransformer3DModel,
        lambda: [
            diffusers.AutoencoderKLLTX2Video(),
            diffusers.AutoencoderKLLTX2Audio(),
            ltx2.LTX2TextConnectors(),
            ltx2.LTX2Vocoder(),
            gemma3(),
        ],
        # Video and sound in one state: 25 latents of sound a second, of 8 channels and 64 / 4 bins.
        (((121 - 1) // 8 + 1) * (512 // 32) * (768 // 32) * 128 + round(121 / 24 * 25) * 8 * 16,),
        3,
        # In each block two attentions of video, two of sound, and one from each to the other.
        48 * (2 * 8 * (4096 + 2048) + 4 * (4096 + 2048) + 4 * 2 * 2048),
    ),
    "hunyuan15_t2v_branchgrpo": Expected(
        diffusers.HunyuanVideo15Transformer3DModel,
        lambda: [
            diffusers.AutoencoderKLHunyuanVideo15(),
            transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**QWEN25)),
            t5(vocab_size=384, d_model=1472, d_ff=3584, num_heads=6, num_layers=12),
        ],
        (32, (61 - 1) // 4 + 1, 480 // 16, 848 // 16),
        2,
        square(2048, 54 * 8 - 1 + 2 * 4),
    ),
    "cogview4_t2i_branchgrpo": Expected(
        lambda: diffusers.CogView4Transformer2DModel(num_layers=28, attention_head_dim=128, num_attention_heads=32),
        lambda: [kl(16, (128, 512, 1024, 1024), 3, False), transformers.GlmModel(transformers.GlmConfig())],
        (16, 128, 128),
        2,
        square(4096, 28 * 4),
    ),
    "aura_flow_t2i_branchgrpo": Expected(
        lambda: diffusers.AuraFlowTransformer2DModel(pos_embed_max_size=9216),
        lambda: [kl(4), t5("UMT5", d_model=2048, d_ff=5120, num_heads=32, vocab_size=32128)],
        (4, 128, 128),
        2,
        square(3072, 4 * 8 + 32 * 4),
    ),
    "pixart_sigma_t2i_branchgrpo": Expected(
        lambda: diffusers.PixArtTransformer2DModel(
            caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
        ),
        lambda: [kl(4), t5()],
        (4, 128, 128),
        2,
        square(1152, 28 * 8),
    ),
    "sana_video_t2v_branchgrpo": Expected(
        diffusers.SanaVideoTransformer3DModel,
        lambda: [diffusers.AutoencoderKLWan(), gemma()],
        (16, (81 - 1) // 4 + 1, 480 // 8, 832 // 8),
        2,
        square(2240, 20 * 8),
    ),
    "mochi_t2v_branchgrpo": Expected(
        diffusers.MochiTransformer3DModel,
        lambda: [diffusers.AutoencoderKLMochi(), t5()],
        (12, (19 - 1) // 6 + 1, 480 // 8, 848 // 8),
        2,
        48 * (4 * 2 * 3072 + 3 * (1536 + 3072)) + 47 * (3072 + 1536) + 4096 + 4096,  # text is half as wide
    ),
    "sdxl_t2i_branchgrpo": Expected(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        lambda: [kl(4), clip("CLIPTextModel"), clip(large=True)],
        (4, 128, 128),
        2,
        # Two layers on the way down, three up, of 2 and 10 blocks; 10 in the middle.
        attended(640, 2048, (2 + 3) * 2) + attended(1280, 2048, (2 + 3 + 1) * 10),
    ),
    "sd15_t2i_branchgrpo": Expected(
        lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        lambda: [kl(4), clip("CLIPTextModel")],
        (4, 512 // 8, 512 // 8),
        2,
        attended(320, 768, 2 + 3) + attended(640, 768, 2 + 3) + attended(1280, 768, 2 + 3 + 1),
    ),
    "wan22_ti2v_5b_t2v_branchgrpo": Expected(
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
        ),
        lambda: [
            diffusers.AutoencoderKLWan(
                base_dim=160,
                z_dim=48,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                decoder_base_dim=256,
                patch_size=2,
            ),
            t5("UMT5", vocab_size=256384),
        ],
        (48, (81 - 1) // 4 + 1, 480 // 16, 832 // 16),
        2,
        square(24 * 128, 30 * 8),
    ),
    "wan22_t2v_a14b_branchgrpo": Expected(
        lambda: torch.nn.ModuleList(diffusers.WanTransformer3DModel() for _ in range(2)),
        lambda: [diffusers.AutoencoderKLWan(), t5("UMT5", vocab_size=256384)],
        (16, 21, 60, 104),
        2,
        2 * square(5120, 40 * 8),
    ),
    "wan22_i2v_a14b_branchgrpo": Expected(
        # Beside a video's 16 channels, 16 of the given frame and 4 that say which frames are given.
        lambda: torch.nn.ModuleList(diffusers.WanTransformer3DModel(in_channels=16 + 16 + 4) for _ in range(2)),
        lambda: [diffusers.AutoencoderKLWan(), t5("UMT5", vocab_size=256384)],
        (16, (81 - 1) // 4 + 1, 480 // 8, 832 // 8),
        2,
        2 * square(40 * 128, 40 * 8),
    ),
}
COUNTED: dict[str, int] = {}
"""Parameters of components, by their class and configuration: several models have the same encoder or VAE."""


def built_parameters(blueprint: Blueprint, name: str) -> int:
    """Parameters of a component as a plan builds it."""
    described = repr((blueprint.classes[name], blueprint.configs[f"{name}/config.json"]))
    if described not in COUNTED:
        with torch.device("meta"):
            COUNTED[described] = count_parameters(blueprint.build(name))
    return COUNTED[described]


EXPECTED["qwen_edit_branchgrpo"] = EXPECTED["qwen_image_t2i_branchgrpo"]
EXPECTED["klein_edit_branchgrpo"] = EXPECTED["klein_t2i_branchgrpo"]


@pytest.mark.parametrize("name", DRIVEN)
def test_the_sizes_that_a_plan_has_are_those_of_the_model(name: str, kept: ModuleType) -> None:
    expected, found = EXPECTED[name], kept.footprint(name)
    recipe = load_recipe(name)
    adapter = Diffusers(DiffusersConfig(**recipe.model.options))
    with torch.device("meta"):
        denoiser, frozen = expected.denoiser(), expected.frozen()
    read = {kind: built_parameters(adapter.blueprint, kind) for kind in adapter.blueprint.classes}
    numbers = sum(parameter.numel() for parameter in denoiser.parameters())
    others = sum(parameter.numel() for module in frozen for parameter in module.parameters())
    assert found.denoiser_parameters == sum(read.pop(kind) for kind in adapter.denoiser_names) == numbers
    assert found.frozen_parameters == sum(read.values()) == others
    assert found.latent_shape == expected.latents
    assert found.rows_per_prediction == expected.rows
    assert found.lora_parameters_per_rank == expected.lora
    assert found.source == adapter.blueprint.origin


@pytest.mark.parametrize("name", DRIVEN)
def test_kept_sizes_are_of_the_recipe_as_it_is(name: str, kept: ModuleType) -> None:
    assert kept.stored()[name]["model"] == kept.options(load_recipe(name)), "run: python scripts/build_models.py"


@pytest.mark.parametrize("name", DRIVEN)
def test_the_description_says_the_smallest_gpu_that_is_enough(name: str, kept: ModuleType) -> None:
    description = load_recipe(name).description
    assert description.endswith(f"; one {kept.smallest_card(kept.kept_plan(name))} GB GPU")


@pytest.mark.parametrize("name", [name for name in recipe_names([builtin_folder()]) if name.endswith("_24gb")])
def test_a_recipe_for_one_card_of_24_gb_leaves_room_on_it(name: str, kept: ModuleType) -> None:
    recipe = load_recipe(name)
    driven = recipe.model.adapter == "diffusers"
    assert kept.smallest_card(kept.kept_plan(name) if driven else plan(name)) == 24
    assert recipe.model.quantize is not None and recipe.description.endswith("; one 24 GB GPU")
    assert not driven or kept.stored()[name]["model"] == kept.options(recipe)


def test_a_published_model_is_measured_offline(kept: ModuleType) -> None:
    name = "pixart_sigma_t2i_branchgrpo"
    assert make_model(load_recipe(name)).footprint() == kept.footprint(name)


# Recipes


# Mochi computes its positions under float32 autocast, which a CPU does not have.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", [name for name in DRIVEN if name not in ON_GPU])
def test_a_recipe_trains_its_small_version(name: str, tmp_path: Path) -> None:
    """The others are trained by test_gpu_runs.py, with their held-out figures."""
    changes = {"tree.steps": 3, "tree.splits": [0], "batch.prompts": 1, "evaluation": None, "run.sample_prompts": 1}
    with constants_of(name), planned_with_weights(small_family(name)):
        result = train(name, {"run.iterations": 1, **changes}, smoke=True, output=tmp_path / "run")
    assert result.finished and result.iterations == 1
    (row,) = metrics(tmp_path / "run")
    assert row["ratio/first_step_max_deviation"] == 0 < row["grad_norm"]
    assert all(f"reward/{reward.reward}/mean" in row for reward in load_recipe(name).rewards)


@pytest.mark.parametrize("name", DRIVEN)
def test_a_small_version_is_judged_by_the_recipes_own_rewards(name: str) -> None:
    full, small = load_recipe(name), load_recipe(name, smoke=True)
    assert full.evaluation and small.evaluation
    for own, others in ((full.rewards, small.rewards), (full.evaluation.rewards, small.evaluation.rewards)):
        assert [each.reward for each in own] == [each.reward for each in others]


def test_every_driven_recipe_is_of_a_published_model() -> None:
    assert [name for name in DRIVEN if published_model(str(load_recipe(name).model.options["path"])) is None] == []
