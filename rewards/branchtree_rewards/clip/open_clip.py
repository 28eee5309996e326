"""CLIP checkpoints of open_clip, read into transformers' CLIPModel.

open_clip names the same tensors otherwise, keeps query, key and value of an attention in one, and stores both
projections transposed. Its architecture is told by `open_clip_config.json`, of which the plain vision transformers are
read here: the ones that HPS and DFN5B are made of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree_rewards.shared.footprints import Skeleton, settings_file, without_memory
from branchtree_rewards.shared.weights import State, build_pretrained, check_fit, without

CONFIG_FILE = "open_clip_config.json"
DROPPED = ("attn_mask",)  # the causal mask; older versions saved it, and transformers makes its own


class VisionConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """`vision_cfg`, with open_clip's own defaults."""

    image_size: int = 224
    layers: int = 12
    width: int = 768
    head_width: int = 64
    patch_size: int = 16
    mlp_ratio: float = 4.0


class TextConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """`text_cfg`, with open_clip's own defaults."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


class OpenClipConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """`model_cfg`: the sizes of a CLIP of two plain transformers."""

    embed_dim: int
    quick_gelu: bool = False
    vision_cfg: VisionConfig
    text_cfg: TextConfig


VIT_H_14 = OpenClipConfig(
    embed_dim=1024,
    vision_cfg=VisionConfig(image_size=224, layers=32, width=1280, head_width=80, patch_size=14),
    text_cfg=TextConfig(width=1024, heads=16, layers=24),
)
VIT_H_14_378 = VIT_H_14.model_copy(
    update={"quick_gelu": True, "vision_cfg": VIT_H_14.vision_cfg.model_copy(update={"image_size": 378})}
)


def read_config(file: Path) -> OpenClipConfig:
    """The `model_cfg` of an `open_clip_config.json`. Raises RewardError for one that is not a plain CLIP."""
    try:
        return OpenClipConfig.model_validate(read_json_object(file, RewardError)["model_cfg"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RewardError(
            f"'{file}' does not describe a CLIP of two plain transformers ({type(error).__name__}: {reason})"
        ) from error


def open_clip_skeleton(path: str, revision: str | None, published: OpenClipConfig) -> Skeleton:
    """The network of the configuration beside the weights, or of the ``published`` one where none is there."""
    from transformers import CLIPModel

    file = settings_file(path, revision, CONFIG_FILE)
    config = clip_config(read_config(file) if file else published)
    return Skeleton(without_memory(lambda: CLIPModel(config)))


def load_open_clip(state: State, config: OpenClipConfig, where: str) -> Any:
    """A float32 CLIPModel that holds exactly the weights ``state``, named as open_clip does.

    Raises RewardError, in the checkpoint's own names, if a tensor is missing, unknown or of another shape.
    """
    from transformers import CLIPModel

    kept = without(state, DROPPED)
    with torch.device("meta"):
        wanted = {name: torch.empty(shape) for name, shape in published_shapes(config).items()}
    check_fit(kept, wanted, where)
    return build_pretrained(CLIPModel, clip_config(config), to_transformers(kept), where, torch.float32)


def clip_config(config: OpenClipConfig) -> Any:
    """The same architecture as a transformers CLIPConfig.

    open_clip reads the text at its highest token id, which is the end token and the vocabulary's last.
    """
    from transformers import CLIPConfig

    vision, text = config.vision_cfg, config.text_cfg
    shared = {"hidden_act": "quick_gelu" if config.quick_gelu else "gelu", "projection_dim": config.embed_dim}
    last = text.vocab_size - 1
    return CLIPConfig(
        projection_dim=config.embed_dim,
        vision_config={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            **shared,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "bos_token_id": last - 1,
            "eos_token_id": last,
            "pad_token_id": last,
            **shared,
        },
    )


def published_shapes(config: OpenClipConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an open_clip checkpoint of this architecture, by name."""
    vision, text, embed = config.vision_cfg, config.text_cfg, config.embed_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text.context_length, text.width),
        "text_projection": (text.width, embed),
        "logit_scale": (),
        "token_embedding.weight": (text.vocab_size, text.width),
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": (patches + 1, vision.width),
        "visual.proj": (vision.width, embed),
        "visual.conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
    }
    norms = {"ln_final": text.width, "visual.ln_pre": vision.width, "visual.ln_post": vision.width}
    shapes |= {f"{norm}.{part}": (width,) for norm, width in norms.items() for part in ("weight", "bias")}
    for prefix, tower in (("transformer", text), ("visual.transformer", vision)):
        for layer in range(tower.layers):
            block = _block_shapes(tower.width, int(tower.width * tower.mlp_ratio))
            shapes |= {f"{prefix}.resblocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _block_shapes(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    linear = {
        "attn.out_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
    }
    shapes |= {f"{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linear.items()}


NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = {"text_projection", "visual.proj"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def to_transformers(state: State) -> State:
    """open_clip's tensors under CLIPModel's names, in float32. ``state`` has the names of `published_shapes`."""
    result: State = {}
    for name, stored in state.items():
        value = stored.float()
        if block := BLOCK.fullmatch(name):
            result |= _block_tensors(block, value)
        else:
            result[NAMES[name]] = value.T.contiguous() if name in TRANSPOSED else value
    return result


def _block_tensors(block: re.Match[str], value: Tensor) -> State:
    tower, layer, part, kind = block.groups()
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
    if part == "attn.in_proj":
        thirds = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{third}.{kind}": rows.contiguous() for third, rows in thirds}
    return {f"{prefix}.{PARTS[part]}.{kind}": value}
