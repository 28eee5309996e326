"""Which Wan2.1 model, and the sizes of the videos that it can make, from configuration files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import pydantic

from branchtree.errors import ModelError
from branchtree_adapters.pipeline.adapter import PipelineConfig
from branchtree_adapters.pipeline.blueprint import T5_XXL, TRANSFORMER, VAE, Published, require_multiple
from branchtree_adapters.pipeline.components import INDEX, is_present
from branchtree_adapters.pipeline.sources import Configs

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
_ALIKE = (
    *(f"Wan-AI/Wan2.1-{name}-Diffusers" for name in ("T2V-1.3B", "T2V-14B", "I2V-14B-480P", "I2V-14B-720P")),
    "engineerA314/Wan2.1-Fun-V1.1-1.3B-InP-Diffusers",
)
"""Hub ids whose sizes are those of the model that is assumed for them."""
_CLIP_VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_CLIP_VIT_H |= {"image_size": 224, "patch_size": 14, "projection_dim": 1024}


class WanConfig(PipelineConfig):
    """Which Wan2.1 model, and the videos it is to make: ``frames`` of ``height`` x ``width`` pixels at ``fps``.

    ``path`` is a hub id, a local pipeline folder, or ``bundled:NAME``. ``guidance`` above 1 is classifier-free
    guidance, against ``negative_prompt`` where a condition has none of its own. ``image_fit`` says what becomes of an
    image of another size: ``exact`` refuses it, ``crop`` scales it to cover the frame and cuts its middle out.
    ``flow_shift`` replaces the scheduler's own. ``max_sequence_length`` is in UMT5 tokens. ``attention`` is an
    attention back-end of diffusers, such as ``flash``.
    """

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

    @property
    def guided(self) -> bool:
        """Return whether guidance is on, by diffusers' rule."""
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


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a WanConfig and a checkpoint."""

    latent: tuple[int, int, int, int]  # channels, frames, rows, columns
    tokens: int  # of one video, in the transformer
    images: int  # frames whose CLIP embeddings the transformer takes: none, the first, or the first and the last


def published(config: WanConfig) -> Published:
    """Return the Wan2.1 model for the task, of 1.3B parameters if the hub id says so and of 14B otherwise."""
    size = "1.3B" if "1.3b" in config.path.lower() else "14B"
    transformer, index = {**_TRANSFORMERS[size], "attention_head_dim": 128}, {}
    if config.task == "image_to_video":
        width = 128 * transformer["num_attention_heads"]
        transformer |= {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": width}
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    configs = {
        INDEX: index,
        TRANSFORMER: transformer,
        TEXT_ENCODER: {**T5_XXL, "vocab_size": 256384},
        IMAGE_ENCODER: _CLIP_VIT_H,
    }
    return Published(_MODELS[config.task, size], configs, _ALIKE)


def work_out_layout(config: WanConfig, configs: Configs) -> Layout:
    """Work out the sizes, and refuse what cannot be made. Raises ModelError that names the remedy."""
    transformer, vae = configs[TRANSFORMER], configs[VAE]
    _require_wan_21(config, configs[INDEX])
    _require_task(config, transformer["in_channels"], vae["z_dim"], vae["scale_factor_temporal"])
    images = _conditioning_images(config, configs[INDEX], transformer)
    temporal, spatial = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
    patch_frames, patch_rows, patch_columns = transformer["patch_size"]
    require_multiple("frames", config.frames, temporal, offset=1)
    require_multiple("height", config.height, spatial * patch_rows)
    require_multiple("width", config.width, spatial * patch_columns)
    frames, rows, columns = (config.frames - 1) // temporal + 1, config.height // spatial, config.width // spatial
    return Layout(
        latent=(vae["z_dim"], frames, rows, columns),
        tokens=(frames // patch_frames) * (rows // patch_rows) * (columns // patch_columns),
        images=images,
    )


def _require_wan_21(config: WanConfig, index: Mapping[str, Any]) -> None:
    found = [name for name in ("transformer_2", "boundary_ratio", "expand_timesteps") if index.get(name)]
    found = [name for name in found if name != "transformer_2" or is_present(index[name])]
    if found:
        raise ModelError(
            f"'{config.path}' is a Wan2.2 model (its model_index.json sets {' and '.join(found)}), which is denoised "
            "in another way; use adapter: diffusers, or "
            f"give a Wan2.1 model, such as 'Wan-AI/{_MODELS[config.task, '14B']}-Diffusers'."
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
    if not is_present(index.get("image_encoder")):
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
