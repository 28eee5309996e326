"""The FLUX.1 family of text-to-image models: diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from branchtree.errors import DataError
from branchtree.plugins import Condition, Conditioning, Register, hookimpl
from branchtree_adapters.pipeline.adapter import PipelineAdapter, PipelineConfig
from branchtree_adapters.pipeline.blueprint import T5_XXL, TRANSFORMER, VAE, Published, require_multiple

_PROJECTIONS = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
LORA_TARGETS = tuple(f"attn.{name}" for name in _PROJECTIONS)
T5_TOKENIZER = "tokenizer_2/tokenizer_config.json"
FLUX_DEV = Published(
    name="FLUX.1-dev",
    configs={
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
        "text_encoder_2/config.json": T5_XXL,
        T5_TOKENIZER: {"model_max_length": 512},
    },
    alike=tuple(f"black-forest-labs/FLUX.1-{name}" for name in ("dev", "schnell", "Krea-dev", "Kontext-dev")),
)
"""What sets FLUX.1-dev's files apart from the defaults of their classes."""


class FluxConfig(PipelineConfig):
    """Which FLUX model, and the size of the images it is to make.

    ``path`` is a hub id, a local pipeline folder, or ``bundled:digits_flux``. ``guidance`` is the distilled guidance
    scale, for models that embed one. ``max_sequence_length`` is in T5 tokens. ``attention`` is an attention back-end of
    diffusers, such as ``flash``.
    """

    height: int = pydantic.Field(default=720, gt=0, le=8192)
    width: int = pydantic.Field(default=720, gt=0, le=8192)
    guidance: float = pydantic.Field(default=3.5, ge=0, le=100)
    max_sequence_length: int = pydantic.Field(default=512, gt=0, le=512)


class Flux(PipelineAdapter):
    """A FLUX model. Latents are packed (tokens, channels): 2x2 patches of the VAE's grid, row by row."""

    modality = "image"
    pipeline_class = "FluxPipeline"
    config_files = (T5_TOKENIZER,)
    published = FLUX_DEV
    encoding_settings = ("max_sequence_length",)
    lora_targets = LORA_TARGETS

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self._ids: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens. Raises ModelError for a size that is no multiple of the patch."""
        patch = 2 ** len(self.configs[VAE]["block_out_channels"])
        require_multiple("height", self.config.height, patch)
        require_multiple("width", self.config.width, patch)
        return self.config.height // patch, self.config.width // patch

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Tokens and channels. Raises ModelError for an image size that the model cannot make."""
        return self.tokens, self.configs[TRANSFORMER]["in_channels"]

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        rows, columns = self._grid
        return rows * columns

    @property
    def _text_tokens(self) -> int:
        longest = self.configs[T5_TOKENIZER].get("model_max_length", self.config.max_sequence_length)
        return int(min(self.config.max_sequence_length, longest))

    def row_costs(self) -> Mapping[str, Any]:
        """Return what a row costs the transformer.

        With S image and text tokens, D the transformer's width, and N double-stream and M single-stream blocks,
        the backward pass keeps S D (28 N + 25 M + 6) numbers for each row, and under gradient checkpointing
        S D (N + M + 28 + 6): the input of each block, and one block computed again. 28 and 25 were measured
        with torch's saved_tensors_hooks for full fine-tuning under bfloat16 autocast; float32 keeps 24 and 21.
        Without gradients 15 S D are alive at once, in a single-stream block's feed-forward, or at most 11 S D where
        there are double-stream blocks alone: measured by following every tensor of a forward on a CPU.
        A forward takes S (N + M) (24 D^2 + 4 S D) operations: twelve D x D products and attention for each token.
        """
        sizes, tokens = self.configs[TRANSFORMER], self.tokens + self._text_tokens
        width, double, single = (
            sizes["num_attention_heads"] * sizes["attention_head_dim"],
            sizes["num_layers"],
            sizes["num_single_layers"],
        )
        unit = tokens * width
        return {
            "activation_numbers_per_row": unit * (28 * double + 25 * single + 6),
            "checkpointed_numbers_per_row": unit * (double + single + 28 + 6),
            "forward_flops_per_row": (double + single) * unit * (24 * width + 4 * tokens),
            "attention_flops_per_row": (double + single) * unit * 4 * tokens,
            "forward_numbers_per_row": unit * (15 if single else 11),
            "conditioning_numbers": self._text_tokens * sizes["joint_attention_dim"] + sizes["pooled_projection_dim"],
        }

    def check(self, condition: Condition) -> None:
        """Refuse a negative prompt, which FLUX's distilled guidance has no use for. Raises DataError."""
        if condition.negative_prompt:
            raise DataError(f"{condition} has a negative prompt, which flux does not take; remove it.")

    def encode_condition(self, condition: Condition) -> Conditioning:
        """Return ``prompt_embeds`` (1, tokens, dim) of T5 and ``pooled_prompt_embeds`` (1, dim) of CLIP.

        Raises DataError for a negative prompt.
        """
        self.check(condition)
        tokens = min(self.config.max_sequence_length, self.pipeline.tokenizer_2.model_max_length)
        text, pooled, _ = self.pipeline.encode_prompt(
            condition.prompt, None, device=self.device, max_sequence_length=tokens
        )
        return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """Draw starting latents (tokens, channels), float32 on the CPU, as FluxPipeline does."""
        rows, columns = self._grid
        shape = (1, self.latent_shape[1] // 4, 2 * rows, 2 * columns)
        packed: Tensor = self.pipeline._pack_latents(torch.randn(shape, generator=generator), *shape)
        return packed[0]

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Have a scheduler make the grid of FluxPipeline for the configured image size, shift included."""
        import numpy as np
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        # The pipeline's own names and what it takes where the scheduler has none of them.
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        shift = calculate_shift(self.tokens, *(scheduler.config.get(name, value) for name, value in defaults.items()))
        given = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=given, mu=shift)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """Return the velocity (B, tokens, channels), float32, of latents (B, tokens, channels) at sigma (B,) in [0, 1].

        The transformer gets its inputs in the dtype it was loaded in, and the timestep with FluxPipeline's roundings.
        """
        device = latents.device
        text = conditioning["prompt_embeds"].to(device, self.dtype)
        text_ids, image_ids = self._positions(device, text.shape[1])
        guided = self.pipeline.transformer.config.guidance_embeds
        guidance = torch.full((len(latents),), self.config.guidance, device=device) if guided else None
        velocity: Tensor = (self.denoiser if denoiser is None else denoiser)(
            hidden_states=latents.to(self.dtype),
            timestep=(sigma.to(device) * 1000).to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(device, self.dtype),
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
            image = self.pipeline._prepare_latent_image_ids(1, *self._grid, device, torch.float32)
            self._ids[key] = (torch.zeros(text_tokens, 3, device=device), image)
        return self._ids[key]

    def vae_latents(self, latents: Tensor) -> Tensor:
        """Return the VAE's grid of latents (B, tokens, channels)."""
        scale = self.pipeline.vae_scale_factor
        return super().vae_latents(self.pipeline._unpack_latents(latents, self.config.height, self.config.width, scale))


@hookimpl
def register_models(register: Register) -> None:
    """Register the model family ``flux``."""
    register("flux", build=Flux, config=FluxConfig, summary="FLUX.1 text-to-image models (diffusers FluxPipeline)")
