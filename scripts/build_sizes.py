"""Write what the hand-written adapters know of their models' components, so that a plan imports no model library.

python scripts/build_sizes.py
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import branchtree_adapters
import branchtree_rewards
import torch
from branchtree_adapters.flux import Flux, FluxConfig
from branchtree_adapters.pipeline.adapter import PipelineAdapter
from branchtree_adapters.pipeline.blueprint import class_defaults, count_parameters, largest_block
from branchtree_adapters.pipeline.components import is_of_transformers
from branchtree_adapters.pipeline.decoders import decoder_weights
from branchtree_adapters.pipeline.denoisers import quantizable_footprint
from branchtree_adapters.pipeline.outline import FILE, ComponentSizes
from branchtree_adapters.wan import Wan
from branchtree_adapters.wan_layout import WanConfig
from branchtree_rewards import imagereward
from branchtree_rewards.clip import network
from branchtree_rewards.clip.clip_score import ClipConfig
from branchtree_rewards.shared import footprints
from branchtree_rewards.shared.footprints import build_numbers
from torch import nn

from branchtree.plugins.registry import registry
from branchtree.plugins.weights import lora_parameters_per_rank

_T5 = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
_ATTENTION = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads")
_CLIP = ("hidden_size", "intermediate_size", "num_hidden_layers")
DECIDING: Mapping[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": (
        *_ATTENTION,
        *("num_single_layers", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds"),
    ),
    "WanTransformer3DModel": (
        *_ATTENTION,
        *("text_dim", "freq_dim", "ffn_dim", "cross_attn_norm", "qk_norm", "image_dim", "added_kv_proj_dim"),
        "pos_embed_seq_len",
    ),
    "AutoencoderKL": (
        *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"),
        *("layers_per_block", "latent_channels", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
    ),
    "AutoencoderKLWan": (
        *("base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales"),
        *("temperal_downsample", "is_residual", "in_channels", "out_channels", "patch_size"),
    ),
    "CLIPTextModel": (*_CLIP, "vocab_size", "max_position_embeddings"),
    "CLIPVisionModel": (*_CLIP, "num_channels", "image_size", "patch_size"),
    "T5EncoderModel": (*_T5, "feed_forward_proj"),
    "UMT5EncoderModel": (*_T5, "feed_forward_proj"),
}
"""The keys of a configuration that decide on the sizes, by class."""
REWARDS: Sequence[tuple[str, Mapping[str, Any]]] = [
    *((name, {}) for name in ("hps", "pickscore", "imagereward", "videoalign", "hpsv3", "geneval", "unifiedreward")),
    *(("clip", {"variant": variant}) for variant in get_args(ClipConfig.model_fields["variant"].annotation)),
]
"""Rewards whose networks are listed, and their settings."""


def models() -> Iterator[PipelineAdapter]:
    """The models that are listed: those of the recipes, and the published ones of the same kinds."""
    for path in ("black-forest-labs/FLUX.1-dev", "bundled:digits_flux", "bundled:words_flux"):
        yield Flux(FluxConfig(path=path))
    for name in ("T2V-1.3B", "T2V-14B"):
        yield Wan(WanConfig(path=f"Wan-AI/Wan2.1-{name}-Diffusers", task="text_to_video"))
    for path in ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "engineerA314/Wan2.1-Fun-V1.1-1.3B-InP-Diffusers"):
        yield Wan(WanConfig(path=path))
    yield Wan(WanConfig(path="bundled:moving_digits_wan"))


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of a class: all of diffusers' classes, which adapters read; of transformers', those that decide."""
    if not is_of_transformers(kind):
        return class_defaults(kind)
    return {key: getattr(kind.config_class(), key) for key in DECIDING[kind.__name__]}


def sizes_of(module: Any, model: PipelineAdapter) -> ComponentSizes:
    """The sizes of a component that is built on torch's meta device."""
    parameters = count_parameters(module)
    if "Transformer" not in type(module).__name__:
        return ComponentSizes(parameters, decoder=decoder_weights(module))
    targets = tuple(model.lora_targets or ())
    per_rank = lora_parameters_per_rank(module, targets)
    return ComponentSizes(parameters, largest_block(module), per_rank, targets, quantizable_footprint([module]))


def component_sizes() -> dict[str, Any]:
    """What the hand-written adapters know of their models' components."""
    pipelines: dict[str, dict[str, Any]] = {}
    classes: dict[str, dict[str, Any]] = {}
    for model in models():
        blueprint, signature = model.blueprint, inspect.signature(model._class.__init__).parameters
        components = pipelines.setdefault(model.pipeline_class, {})
        for name, kind in blueprint.classes.items():
            optional = signature[name].default is not inspect.Parameter.empty and name not in model.denoiser_names
            components[name] = {"class": kind.__name__, "optional": optional}
            defaults, deciding = defaults_of(kind), DECIDING[kind.__name__]
            facts = {
                "library": kind.__module__.partition(".")[0],
                "defaults": defaults,
                "deciding": deciding,
                "sizes": [],
            }
            entries = classes.setdefault(kind.__name__, facts)["sizes"]
            config = {**defaults, **blueprint.configs[f"{name}/config.json"]}
            decided = {key: config[key] for key in deciding}
            if decided not in [entry["config"] for entry in entries]:
                with torch.device("meta"):
                    sizes = sizes_of(blueprint.build(name), model)
                entries.append({"config": decided, "sizes": asdict(sizes)})
    return {"pipelines": pipelines, "classes": classes}


def published_parameters() -> dict[str, Mapping[str, int]]:
    """The parameters of the networks of rewards, by the name of the network and its outermost modules."""
    found: dict[str, Mapping[str, int]] = {}

    def counted(name: str, build: Callable[[], nn.Module]) -> Mapping[str, int]:
        found[name] = build_numbers(build)
        return found[name]

    with ExitStack() as stack:
        for module in (footprints, network, imagereward):
            stack.enter_context(mock.patch.object(module, "published_numbers", counted))
        for name, settings in REWARDS:
            entry = registry().reward(name)
            assert entry.build(entry.config(**settings)).footprint() is not None
    return dict(sorted(found.items()))


def main() -> None:
    """Write the files."""
    contents = {
        Path(branchtree_adapters.__file__).parent / "pipeline" / FILE: component_sizes(),
        Path(branchtree_rewards.__file__).parent / "data" / footprints.PARAMETERS: published_parameters(),
    }
    for file, content in contents.items():
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
