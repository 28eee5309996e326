"""The FLUX.1 family of text-to-image models, on the parts of diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from branchtree.errors import DataError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Conditioning, Footprint, Media, weights
from branchtree.plugins.hookspecs import Register, hookimpl
from branchtree_adapters.pipeline import sources as shared
from branchtree_adapters.pipeline import speed
from branchtree_adapters.pipeline.adapter import PipelineAdapter
from branchtree_adapters.pipeline.decoders import decoder_of_images
from branchtree_adapters.pipeline.grids import scheduler_grid

_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
LORA_TARGETS = tuple(f"attn.{name}" for name in _PROJECTIONS)

DECODE_PIXELS = 8 * 1024**2  # sent through the VAE at once
KNOWN = tuple(f"black-forest-labs/FLUX.1-{name}" for name in ("dev", "schnell", "Krea-dev", "Kontext-dev"))
"""Hub ids whose sizes are FLUX.1-dev's, or hardly less."""
FLUX_DEV: shared.Configs = {
    "transformer/config.json": {"guidance_embeds": True},
    "vae/config.json": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder/config.json": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "text_encoder_2/config.json": {
        "d_model": 4096,
        "d_ff": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
}
"""The files that tell a model's sizes, and what sets FLUX.1-dev's apart from the defaults of their classes."""


class FluxConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Which FLUX model, and the images it is to make. ``height`` and ``width`` are in pixels.

    ``path`` is a hub id, a local pipeline folder, or ``bundled:digits_flux``. ``guidance`` is the distilled
    guidance scale, for models that embed one. ``max_sequence_length`` is in T5 tokens. ``attention`` is an attention
    back-end of diffusers, such as ``flash``.
    """

    path: PathOrName
    height: int = pydantic.Field(default=720, gt=0, le=8192)
    width: int = pydantic.Field(default=720, gt=0, le=8192)
    guidance: float = pydantic.Field(default=3.5, ge=0, le=100)
    max_sequence_length: int = pydantic.Field(default=512, gt=0, le=512)
    revision: str | None = None
    attention: str | None = None


class Flux(PipelineAdapter):
    """A FLUX model. Latents are packed (tokens, channels): 2x2 patches of the VAE's grid, row by row."""

    modality = "image"
    prediction = "velocity"
    rows_per_prediction = 1
    media: frozenset[str] = frozenset()
    frozen_parts = ("vae", "text_encoder", "text_encoder_2")
    encoders = ("text_encoder", "text_encoder_2")
    encoding_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora_targets = LORA_TARGETS

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self._ids: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    def footprint(self) -> Footprint:
        """The model's sizes, from config.json files; for a hub id not in the local cache, those of FLUX.1-dev.

        With S image and text tokens, D the transformer's width, and N double-stream and M single-stream blocks,
        the backward pass keeps S D (28 N + 25 M + 6) numbers for each row, and under gradient checkpointing
        S D (N + M + 28 + 6): the input of each block, and one block computed again. 28 and 25 were measured
        with torch's saved_tensors_hooks for full fine-tuning under bfloat16 autocast; float32 keeps 24 and 21.
        Without gradients 15 S D are alive at once, in a single-stream block's feed-forward, or at most 11 S D where
        there are double-stream blocks alone: measured by following every tensor of a forward on a CPU.
        A forward takes S (N + M) (24 D^2 + 4 S D) operations: twelve D x D products and attention for each token.
        Raises ModelError for a missing folder or an image size the model cannot make.
        """
        source = shared.locate_pipeline(self.config.path, self.config.revision)
        configs, origin = shared.read_configs(source, FLUX_DEV, "FLUX.1-dev")
        transformer, *frozen = shared.on_meta(lambda: _build(configs))
        rows, columns = self._grid(2 ** (len(configs["vae/config.json"]["block_out_channels"]) - 1))
        text_limit = configs["tokenizer_2/tokenizer_config.json"].get(
            "model_max_length", self.config.max_sequence_length
        )
        sizes = transformer.config
        text = min(self.config.max_sequence_length, text_limit)
        tokens = rows * columns + text
        unit = tokens * sizes.num_attention_heads * sizes.attention_head_dim
        double, single = sizes.num_layers, sizes.num_single_layers
        return Footprint(
            denoiser_parameters=shared.count_parameters(transformer),
            frozen_parameters=sum(shared.count_parameters(part) for part in frozen),
            latent_shape=(rows * columns, sizes.in_channels),
            activation_numbers_per_row=unit * (28 * double + 25 * single + 6),
            checkpointed_numbers_per_row=unit * (double + single + 28 + 6),
            forward_flops_per_row=(double + single) * unit * (24 * unit // tokens + 4 * tokens),
            rows_per_prediction=self.rows_per_prediction,
            lora_parameters_per_rank=weights.lora_parameters_per_rank(transformer, LORA_TARGETS),
            source=origin,
            forward_numbers_per_row=unit * (15 if single else 11),
            attention_flops_per_row=(double + single) * unit * 4 * tokens,
            conditioning_numbers=text * sizes.joint_attention_dim + sizes.pooled_projection_dim,
            largest_block_parameters=shared.largest_block(transformer),
            decoder=decoder_of_images(frozen[0], self.config.height, self.config.width, self._decoded_at_once),
            assumed=shared.is_assumed(self.config.path, origin, KNOWN),
        )

    @property
    def _decoded_at_once(self) -> int:
        return max(1, DECODE_PIXELS // (self.config.height * self.config.width))

    def _grid(self, vae_scale: int) -> tuple[int, int]:
        """Rows and columns of latent tokens. Raises ModelError for a size that is no multiple of the patch."""
        patch = 2 * vae_scale
        for name, size in (("height", self.config.height), ("width", self.config.width)):
            shared.require_multiple(name, size, patch)
        return self.config.height // patch, self.config.width // patch

    def check(self, condition: Condition) -> None:
        """Refuse a negative prompt, which FLUX's distilled guidance has no use for. Raises DataError."""
        if condition.negative_prompt:
            raise DataError(f"{condition} has a negative prompt, which flux does not take; remove it.")

    def load(self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype) -> None:
        """Load the pipeline: the transformer to ``device``, the VAE to the CPU until it is needed.

        Encoders are read when ``encode`` first needs them. Raises ModelError if the source cannot be read or the image
        size does not fit the model.
        """
        from diffusers import FluxPipeline

        source = shared.locate_pipeline(self.config.path, self.config.revision)
        speed.check_attention(self.config.attention)
        loaded = self._read(FluxPipeline, source, dtype, denoiser_dtype)
        self._grid(loaded.vae_scale_factor)
        speed.set_attention(loaded.transformer, self.config.attention)
        self._keep(loaded, device, denoiser_dtype)
        shared.channels_last(loaded.vae)

    @torch.no_grad()
    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Encode P prompts, one at a time so that no row depends on another.

        Returns, on the CPU in the encoders' dtype, ``prompt_embeds`` (P, tokens, dim) of T5 and
        ``pooled_prompt_embeds`` (P, dim) of CLIP. Raises DataError for a negative prompt, which is not used here.
        """
        self._with_encoders()
        rows: list[tuple[Tensor, Tensor]] = []
        for condition in conditions:
            self.check(condition)
            rows.append(self._encode_text(condition.prompt))
        prompt_embeds, pooled_prompt_embeds = (torch.cat(column) for column in zip(*rows, strict=True))
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _encode_text(self, prompt: str, prompt_2: str | None = None) -> tuple[Tensor, Tensor]:
        """T5's embedding (1, tokens, dim) of ``prompt_2``, by default ``prompt``, and CLIP's (1, dim), on the CPU."""
        tokens = min(self.config.max_sequence_length, self._pipeline.tokenizer_2.model_max_length)
        text, pooled, _ = self._pipeline.encode_prompt(
            prompt, prompt_2, device=self._device, max_sequence_length=tokens
        )
        return text.cpu(), pooled.cpu()

    @torch.no_grad()
    def _embedded(self, texts: Mapping[str, str], shade: int) -> Mapping[str, Tensor]:
        text, pooled = self._encode_text(texts["tokenizer"], texts["tokenizer_2"])
        return {"text_encoder": pooled, "text_encoder_2": text}

    def _encoding_settings(self) -> dict[str, object]:
        return {"max_sequence_length": self.config.max_sequence_length}

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Starting latents (tokens, channels), float32 on the CPU: what FluxPipeline draws from ``generator``."""
        from diffusers.utils.torch_utils import randn_tensor

        rows, columns = self._grid(self._pipeline.vae_scale_factor)
        shape = (1, self._pipeline.transformer.config.in_channels // 4, 2 * rows, 2 * columns)
        noise = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
        packed: Tensor = self._pipeline._pack_latents(noise, *shape)
        return packed[0]

    def sigmas(self, steps: int) -> Tensor:
        """The grid of FluxPipeline for the configured image size, shift included: (steps + 1,) float32, to 0.

        Raises ModelError for a scheduler whose grid is not one of flow matching, or that the pipeline cannot use.
        """
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        rows, columns = self._grid(self._pipeline.vae_scale_factor)
        scheduler = self._pipeline.scheduler
        config = scheduler.config
        # The pipeline's own names and what it takes where the scheduler has none of them.
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        shift = calculate_shift(rows * columns, *(config.get(name, value) for name, value in defaults.items()))
        given = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        return scheduler_grid(
            scheduler,
            self.config.path,
            steps,
            lambda fresh: retrieve_timesteps(fresh, steps, "cpu", sigmas=given, mu=shift),
            {},
        )

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The velocity (B, tokens, channels), float32, of latents (B, tokens, channels) at sigma (B,) in [0, 1].

        ``conditioning`` holds B rows of what ``encode`` returned. The transformer gets its inputs in the dtype it
        was loaded in, and the timestep with the roundings of FluxPipeline.
        """
        device = latents.device
        text = conditioning["prompt_embeds"].to(device, self._dtype)
        text_ids, image_ids = self._positions(device, text.shape[1])
        guided = self._pipeline.transformer.config.guidance_embeds
        guidance = torch.full((len(latents),), self.config.guidance, device=device) if guided else None
        velocity: Tensor = (self.denoiser if denoiser is None else denoiser)(
            hidden_states=latents.to(self._dtype),
            timestep=(sigma.to(device) * 1000).to(self._dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, self._dtype),
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity.float()

    def _positions(self, device: torch.device, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Position ids of text (text tokens, 3) and image (tokens, 3), made once for each device and length."""
        key = (device, text_tokens)
        if key not in self._ids:
            grid = self._grid(self._pipeline.vae_scale_factor)
            image = self._pipeline._prepare_latent_image_ids(1, *grid, device, torch.float32)
            self._ids[key] = (torch.zeros(text_tokens, 3, device=device), image)
        return self._ids[key]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Media:
        """Decode latents (B, tokens, channels) to images (B, 3, H, W), float32 in [0, 1], on the device."""
        pipeline = self._pipeline
        vae = shared.on_device(pipeline.vae, self._device)
        size = (self.config.height, self.config.width, pipeline.vae_scale_factor)
        rows = self._decoded_at_once
        images = []
        for first in range(0, len(latents), rows):
            packed = latents[first : first + rows].to(self._device)
            grid = pipeline._unpack_latents(packed, *size) / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(grid.to(vae.dtype), return_dict=False)[0]
            images.append((pixels.float() / 2 + 0.5).clamp(0, 1))
        return Media(images=torch.cat(images))


def _build(configs: shared.Configs) -> tuple[Any, nn.Module, nn.Module, nn.Module]:
    """Transformer, VAE, CLIP and T5 with fresh weights, from the contents of their config.json files."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    return (
        FluxTransformer2DModel.from_config(dict(configs["transformer/config.json"])),
        AutoencoderKL.from_config(dict(configs["vae/config.json"])),
        CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder/config.json"]))),
        T5EncoderModel(T5Config.from_dict(dict(configs["text_encoder_2/config.json"]))),
    )


@hookimpl
def register_models(register: Register) -> None:
    """Register the model family ``flux``."""
    register("flux", build=Flux, config=FluxConfig, summary="FLUX.1 text-to-image models (diffusers FluxPipeline)")
