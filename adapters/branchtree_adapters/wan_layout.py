"""Which Wan2.1 model, and the sizes of the videos that it can make, from configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import pydantic

from branchtree.errors import ModelError
from branchtree.files.paths import PathOrName
from branchtree_adapters.pipeline import sources as shared

INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
TEXT_ENCODER, IMAGE_ENCODER = "text_encoder/config.json", "image_encoder/config.json"
ATTENDED_TEXT_TOKENS = 512
"""Tokens of text that diffusers' attention assumes where it has projections for images (WanAttnProcessor)."""

_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
}
_MODELS = {
    ("image_to_video", "14B"): "Wan2.1-I2V-14B-480P",
    ("image_to_video", "1.3B"): "Wan2.1-Fun-V1.1-1.3B-InP",
    ("text_to_video", "14B"): "Wan2.1-T2V-14B",
    ("text_to_video", "1.3B"): "Wan2.1-T2V-1.3B",
}
KNOWN = (
    *(f"Wan-AI/Wan2.1-{name}-Diffusers" for name in ("T2V-1.3B", "T2V-14B", "I2V-14B-480P", "I2V-14B-720P")),
    "engineerA314/Wan2.1-Fun-V1.1-1.3B-InP-Diffusers",
)
"""Hub ids whose sizes are those of the model that is assumed for them."""
DECODE_PIXELS = 16 * 1024**2  # frames x height x width sent through the VAE at once; a longer video goes alone
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
_CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
_TRANSFORMER_DEFAULTS = {
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
_VAE_DEFAULTS = {"z_dim": 16, "scale_factor_temporal": 4, "scale_factor_spatial": 8}


class WanConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Which Wan2.1 model, and the videos it is to make: ``frames`` of ``height`` x ``width`` pixels at ``fps``.

    ``path`` is a hub id, a local pipeline folder, or ``bundled:NAME``. ``guidance`` above 1 is classifier-free
    guidance, against ``negative_prompt`` where a condition has none of its own. ``image_fit`` says what becomes of
    an image of another size: ``exact`` refuses it, ``crop`` scales it to cover the frame and cuts its middle out.
    ``flow_shift`` replaces the scheduler's own. ``max_sequence_length`` is in UMT5 tokens.
    ``attention`` is an attention back-end of diffusers, such as ``flash``.
    """

    path: PathOrName
    task: Literal["image_to_video", "text_to_video"] = "image_to_video"
    height: int = pydantic.Field(default=480, gt=0, le=8192)
    width: int = pydantic.Field(default=832, gt=0, le=8192)
    frames: int = pydantic.Field(default=81, gt=0, le=10_000)
    fps: float = pydantic.Field(default=16.0, ge=0.1, le=1000)
    guidance: float = pydantic.Field(default=5.0, ge=0, le=100)
    negative_prompt: str = ""
    image_fit: Literal["exact", "crop"] = "exact"
    flow_shift: float | None = pydantic.Field(default=None, ge=0.01, le=100)
    max_sequence_length: int = pydantic.Field(default=ATTENDED_TEXT_TOKENS, gt=0, le=ATTENDED_TEXT_TOKENS)
    revision: str | None = None
    attention: str | None = None

    @property
    def guided(self) -> bool:
        """Whether guidance is on, by diffusers' rule."""
        return self.guidance > 1

    @property
    def rows_per_prediction(self) -> int:
        """Rows through the transformer for each prediction: two under guidance."""
        return 2 if self.guided else 1

    @pydantic.model_validator(mode="after")
    def _negative_prompt_needs_guidance(self) -> Self:
        if self.negative_prompt and not self.guided:
            raise ValueError("negative_prompt is used by guidance above 1 alone; raise guidance or remove it")
        return self


def decoded_at_once(config: WanConfig) -> int:
    """Videos that go through the VAE at once."""
    return max(1, DECODE_PIXELS // (config.frames * config.height * config.width))


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a WanConfig and a checkpoint."""

    latent: tuple[int, int, int, int]  # channels, frames, rows, columns
    tokens: int  # of one video, in the transformer
    images: int  # frames whose CLIP embeddings the transformer takes: none, the first, or the first and the last


def read_wan_configs(config: WanConfig) -> tuple[shared.Configs, str]:
    """The contents of the model's configuration files by name, and where they come from, in words.

    For a hub id that is not in the local cache they are those of the published Wan2.1 model for the task, of 1.3B
    parameters if the id says so and of 14B otherwise. Raises ModelError.
    """
    size = "1.3B" if "1.3b" in config.path.lower() else "14B"
    model, assumed = _MODELS[config.task, size], _assumed(config.task == "image_to_video", _TRANSFORMERS[size])
    source = shared.locate_pipeline(config.path, config.revision)
    index, origin = shared.read_configs(source, {INDEX: assumed[INDEX]}, model)
    names = [TRANSFORMER, VAE, TEXT_ENCODER, *([IMAGE_ENCODER] if has_part(index[INDEX], "image_encoder") else [])]
    parts, origin = shared.read_configs(source, {name: assumed.get(name, {}) for name in names}, model)
    return {**index, **parts}, origin


def _assumed(with_image: bool, sizes: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    transformer, index = {**sizes, "attention_head_dim": 128}, {}
    if with_image:
        width = 128 * sizes["num_attention_heads"]
        transformer |= {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": width}
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    return {
        INDEX: index,
        TRANSFORMER: transformer,
        VAE: _VAE_DEFAULTS,
        TEXT_ENCODER: _UMT5_XXL,
        IMAGE_ENCODER: _CLIP_VIT_H,
    }


def has_part(index: Mapping[str, Any], name: str) -> bool:
    """Whether a pipeline's model_index.json, or its ``config``, names a part; an absent one is null, or two nulls."""
    entry = index.get(name)
    return bool(entry[0]) if isinstance(entry, list | tuple) else entry is not None


def work_out_layout(config: WanConfig, configs: shared.Configs) -> Layout:
    """Work out the sizes, and refuse what cannot be made. Raises ModelError that names the remedy."""
    transformer = {**_TRANSFORMER_DEFAULTS, **configs[TRANSFORMER]}
    vae = {**_VAE_DEFAULTS, **configs[VAE]}
    _require_wan_21(config, configs[INDEX])
    _require_task(config, transformer["in_channels"], vae["z_dim"], vae["scale_factor_temporal"])
    images = _conditioning_images(config, configs[INDEX], transformer)
    temporal, spatial = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
    patch_frames, patch_rows, patch_columns = transformer["patch_size"]
    shared.require_multiple("frames", config.frames, temporal, offset=1)
    shared.require_multiple("height", config.height, spatial * patch_rows)
    shared.require_multiple("width", config.width, spatial * patch_columns)
    frames, rows, columns = (config.frames - 1) // temporal + 1, config.height // spatial, config.width // spatial
    return Layout(
        latent=(vae["z_dim"], frames, rows, columns),
        tokens=(frames // patch_frames) * (rows // patch_rows) * (columns // patch_columns),
        images=images,
    )


def _require_wan_21(config: WanConfig, index: Mapping[str, Any]) -> None:
    found = [name for name in ("transformer_2", "boundary_ratio") if has_part(index, name)]
    found += ["expand_timesteps"] if index.get("expand_timesteps") else []
    if found:
        raise ModelError(
            f"'{config.path}' is a Wan2.2 model (its model_index.json sets {' and '.join(found)}), which is denoised "
            f"in another way; give a Wan2.1 model, such as 'Wan-AI/{_MODELS[config.task, '14B']}-Diffusers'."
        )


def _require_task(config: WanConfig, channels: int, z: int, mask: int) -> None:
    """Image-to-video transformers take latents, mask channels and the conditioning video's latents."""
    suits = {"image_to_video": 2 * z + mask, "text_to_video": z}
    if channels == suits[config.task]:
        return
    other = next((task for task, number in suits.items() if number == channels), None)
    remedy = f"set task to '{other}', or " if other else ""
    raise ModelError(
        f"the transformer of '{config.path}' takes {channels} input channels, and {config.task} needs "
        f"{suits[config.task]}; {remedy}give a checkpoint that was trained for {config.task}."
    )


def _conditioning_images(config: WanConfig, index: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
    if transformer["image_dim"] is None:
        return 0
    if not has_part(index, "image_encoder"):
        raise ModelError(
            f"the transformer of '{config.path}' takes image embeddings, and the model has no image_encoder; "
            "give a complete pipeline."
        )
    apart = transformer["added_kv_proj_dim"] is not None  # text and image have attention of their own
    if apart and config.max_sequence_length != ATTENDED_TEXT_TOKENS:
        raise ModelError(
            f"max_sequence_length is {config.max_sequence_length}, and the transformer of '{config.path}', with "
            f"attention for images, works with {ATTENDED_TEXT_TOKENS} alone; set that."
        )
    return 1 if transformer["pos_embed_seq_len"] is None else 2
