"""CLIP networks as transformers' CLIPModel, from its own layout or from checkpoints of open_clip; and their features.

open_clip names the same tensors otherwise, keeps query, key and value of an attention in one, and stores both
projections transposed. Its architecture is given by `open_clip_config.json`, of which the plain vision transformers are
read here: the ones that HPS and DFN5B are made of. Axis letters: B samples, C channels, H height, W width.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from torch.nn import functional

from branchtree.errors import RewardError
from branchtree.files.json_lines import read_json_object
from branchtree_rewards.clip.text import token_ids
from branchtree_rewards.shared.footprints import Skeleton, build_numbers, published_numbers
from branchtree_rewards.shared.source import WeightsSource, cause, file_at_hand
from branchtree_rewards.shared.weights import State, build_pretrained, check_fit, load_folder, without

OPENAI_SIZES = {
    (32, 768, 224): "vit_b_32",
    (16, 768, 224): "vit_b_16",
    (14, 1024, 224): "vit_l_14",
    (14, 1024, 336): "vit_l_14_336",
}


def load_clip(source: WeightsSource) -> tuple[Any, Path]:
    """Return the CLIPModel of ``source`` in float32 on the CPU, and the file that its weights came from.

    Raises RewardError if there is no such file, or it does not fit its config.json.
    """
    from transformers import CLIPModel

    return load_folder(CLIPModel, source)


def clip_size(config: Any) -> str | None:
    """Return the name of OpenAI's CLIP that has the sizes of a CLIPConfig, such as "vit_b_32"; None if none has."""
    vision = config.vision_config
    return OPENAI_SIZES.get((vision.patch_size, vision.hidden_size, vision.image_size))


def image_features(network: Any, images: Tensor) -> Tensor:
    """Return the projected features (B, E), float32, of preprocessed images (B, C, H, W)."""
    return _projected(network.get_image_features(images))


def text_features(network: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the projected features (B, E), float32, of prompts, on the network's device."""
    ids = token_ids(tokenizer, prompts, network.config.text_config.max_position_embeddings)
    return _projected(network.get_text_features(ids.to(network.device)))


def _projected(output: Any) -> Tensor:
    """Transformers 4 returns the features themselves, and 5 an output that holds them as its pooled output."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def cosine(network: Any, tokenizer: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the cosine (B,) of image i with prompt i, without logit scale; in float32 whatever the network's type.

    Args:
        network: A transformers CLIPModel.
        tokenizer: The tokenizer that belongs to it.
        images: Preprocessed (B, C, H, W), on the network's device.
        prompts: B prompts.
    """
    pictures, texts = image_features(network, images), text_features(network, tokenizer, prompts)
    return (functional.normalize(pictures, dim=-1) * functional.normalize(texts, dim=-1)).sum(dim=-1)


# Checkpoints of open_clip

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
    """Return the `model_cfg` of an `open_clip_config.json`. Raises RewardError for one that is not a plain CLIP."""
    try:
        return OpenClipConfig.model_validate(read_json_object(file, RewardError)["model_cfg"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RewardError(f"'{file}' does not describe a CLIP of two plain transformers ({cause(error)})") from error


def clip_skeleton(path: str, revision: str | None, published: OpenClipConfig) -> Skeleton:
    """Return the size by the configuration beside the weights, or by the ``published`` one where there is none."""
    file = file_at_hand(path, revision, CONFIG_FILE)
    config = read_config(file) if file else published

    def build() -> torch.nn.Module:
        from transformers import CLIPModel

        network: torch.nn.Module = CLIPModel(clip_config(config))
        return network

    size = config.vision_cfg.image_size
    return Skeleton(build_numbers(build) if file else published_numbers(f"open_clip ViT-H-14 at {size}", build))


def load_open_clip(state: State, config: OpenClipConfig, where: str) -> Any:
    """Return a float32 CLIPModel that holds exactly the weights ``state``, named as open_clip does.

    Raises RewardError, in the checkpoint's own names, if a tensor is missing, unknown or of another shape.
    """
    from transformers import CLIPModel

    kept = without(state, DROPPED)
    try:
        with torch.device("meta"):
            wanted = {name: torch.empty(shape) for name, shape in published_shapes(config).items()}
    except Exception as error:  # each library below has exceptions of its own for sizes that make no model
        raise RewardError(f"the configuration beside '{where}' makes no CLIP ({cause(error)})") from error
    check_fit(kept, wanted, where)
    return build_pretrained(CLIPModel, clip_config(config), to_transformers(kept), where, torch.float32)


def clip_config(config: OpenClipConfig) -> Any:
    """Return the same architecture as a transformers CLIPConfig.

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


NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
"""open_clip's names of the tensors outside of blocks, and transformers'."""
BLOCK_NAMES = {
    "attn.in_proj_weight": [f"self_attn.{row}_proj.weight" for row in "qkv"],
    "attn.in_proj_bias": [f"self_attn.{row}_proj.bias" for row in "qkv"],
    **{f"ln_{norm}.{kind}": [f"layer_norm{norm}.{kind}"] for norm in (1, 2) for kind in ("weight", "bias")},
    **{
        f"{layer}.{kind}": [f"{ours}.{kind}"]
        for kind in ("weight", "bias")
        for layer, ours in {
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items()
    },
}
"""open_clip's names of a block's tensors, and transformers' names of what each holds, one above the other."""
TRANSPOSED = {"text_projection", "visual.proj"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def published_shapes(config: OpenClipConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an open_clip checkpoint of this architecture, by name."""
    from transformers import CLIPModel

    with torch.device("meta"):
        ours = {name: tuple(value.shape) for name, value in CLIPModel(clip_config(config)).state_dict().items()}
    names = list(NAMES)
    for prefix, tower in (("transformer", config.text_cfg), ("visual.transformer", config.vision_cfg)):
        names += [f"{prefix}.resblocks.{layer}.{name}" for layer in range(tower.layers) for name in BLOCK_NAMES]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        held = _held(name)
        shape = ours[held[0]]
        whole = (shape[0] * len(held), *shape[1:]) if shape else shape
        shapes[name] = whole[::-1] if name in TRANSPOSED else whole
    return shapes


def to_transformers(state: State) -> State:
    """Return open_clip's tensors, named as in `published_shapes`, under CLIPModel's names in float32."""
    result: State = {}
    for name, stored in state.items():
        held = _held(name)
        value = stored.float().T if name in TRANSPOSED else stored.float()
        rows = value.chunk(len(held)) if len(held) > 1 else [value]
        result |= {ours: row.contiguous() for ours, row in zip(held, rows, strict=True)}
    return result


def _held(name: str) -> list[str]:
    """Return CLIPModel's names of what open_clip's tensor ``name`` holds."""
    block = BLOCK.fullmatch(name)
    if block is None:
        return [NAMES[name]]
    tower, layer, inner = block.groups()
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
    return [f"{prefix}.{ours}" for ours in BLOCK_NAMES[inner]]
