"""The sizes of a Wan2.1 model, worked out from its configuration files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from branchtree.plugins import Footprint, weights
from branchtree_adapters.pipeline import sources as shared
from branchtree_adapters.pipeline.decoders import decoder_of_videos
from branchtree_adapters.wan_layout import (
    IMAGE_ENCODER,
    KNOWN,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    Layout,
    WanConfig,
    decoded_at_once,
    read_wan_configs,
    work_out_layout,
)


def footprint(config: WanConfig, lora_targets: tuple[str, ...]) -> Footprint:
    """The sizes of the model that ``config`` names; see the functions below for how. Raises ModelError."""
    configs, origin = read_wan_configs(config)
    layout = work_out_layout(config, configs)
    transformer, *frozen = shared.on_meta(lambda: _build(configs))
    work = Work(transformer.config, layout, config.max_sequence_length, layout.images * _image_tokens(configs))
    return Footprint(
        denoiser_parameters=shared.count_parameters(transformer),
        frozen_parameters=sum(shared.count_parameters(part) for part in frozen),
        latent_shape=layout.latent,
        activation_numbers_per_row=work.activations,
        checkpointed_numbers_per_row=work.checkpointed,
        forward_flops_per_row=work.forward_flops,
        rows_per_prediction=config.rows_per_prediction,
        lora_parameters_per_rank=weights.lora_parameters_per_rank(transformer, lora_targets),
        source=origin,
        forward_numbers_per_row=work.forward_peak,
        attention_flops_per_row=work.attention_flops,
        conditioning_numbers=work.conditioning(config.rows_per_prediction),
        # The VAE and the image encoder, as in diffusers' own examples.
        frozen_float32_parameters=sum(shared.count_parameters(part) for part in (frozen[0], *frozen[2:])),
        largest_block_parameters=shared.largest_block(transformer),
        decoder=decoder_of_videos(frozen[0], layout.latent, decoded_at_once(config)),
        assumed=shared.is_assumed(config.path, origin, KNOWN),
    )


@dataclass(frozen=True)
class Work:
    """What one row costs: S video tokens and C context tokens of width D, N blocks with feed-forwards of width E.

    Numbers are in units of the compute precision. They were measured under bfloat16 autocast, where a number of 2
    bytes is the unit: Wan's norms, modulations and residual sums work on float32 copies, and each counts as two.
    """

    sizes: Any  # the transformer's configuration
    layout: Layout
    text: int  # tokens
    image: int  # tokens

    @property
    def width(self) -> int:
        """D."""
        return int(self.sizes.num_attention_heads * self.sizes.attention_head_dim)

    @property
    def _block(self) -> int:
        tokens, per_token = self.layout.tokens, 34 if self.sizes.added_kv_proj_dim is None else 36
        context = 6 * (self.text + self.image) * self.width
        return int(tokens * (per_token * self.width + 2 * self.sizes.ffn_dim) + context)

    @property
    def _ends(self) -> int:
        return (7 * self.layout.tokens + 4 * (self.text + self.image)) * self.width

    @property
    def activations(self) -> int:
        """Kept for the backward pass: N (34 S D + 2 S E + 6 C D) + 7 S D + 4 C D; image attention adds 2 N S D.

        Measured with torch's saved_tensors_hooks for full fine-tuning. In units of 4 bytes float32 keeps 22, 2, 4 in a
        block and 4, 3 outside; LoRA on bfloat16 weights keeps 25, 2, 6 and 2, 0 in units of 2 bytes.
        """
        return int(self.sizes.num_layers * self._block + self._ends)

    @property
    def checkpointed(self) -> int:
        """Kept under gradient checkpointing: the input S D of each block, one block computed again, and the ends."""
        return int(self.sizes.num_layers * self.layout.tokens * self.width + self._block + self._ends)

    @property
    def forward_peak(self) -> int:
        """Alive at once without gradients: S max(14 D, 7 D + 2 E) + 2 C D, in the modulation or the feed-forward.

        Measured by following every tensor of a forward pass on a CPU.
        """
        peak = max(14 * self.width, 7 * self.width + 2 * self.sizes.ffn_dim)
        return int(self.layout.tokens * peak + 2 * (self.text + self.image) * self.width)

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of a forward pass, a multiplication and an addition counted as two.

        A block takes 12 S D^2 (projections of video tokens) + 4 S D E (feed-forward) + 4 C D^2 (keys and values of the
        context) + 4 S (S + C) D (attention). Embedding text, image, time and patches, and the output, are added.
        """
        sizes, tokens, width = self.sizes, self.layout.tokens, self.width
        context = 4 * width * (self.text * width + self.image * (sizes.added_kv_proj_dim or width))
        block = 12 * tokens * width**2 + 4 * tokens * width * sizes.ffn_dim + context
        ends = 2 * tokens * width * math.prod(sizes.patch_size) * (sizes.in_channels + sizes.out_channels)
        ends += 2 * self.text * width * (sizes.text_dim + width) + 2 * width * (sizes.freq_dim + 7 * width)
        if self.image:
            ends += 2 * self.image * sizes.image_dim * (sizes.image_dim + width)
        return float(sizes.num_layers * block + ends) + self.attention_flops

    @property
    def attention_flops(self) -> float:
        """The operations of attention among them: N 4 S (S + C) D."""
        tokens = self.layout.tokens
        return float(self.sizes.num_layers * 4 * tokens * self.width * (tokens + self.text + self.image))

    def conditioning(self, texts: int) -> int:
        """Return the numbers of one encoded condition with ``texts`` texts; a float32 number counts twice."""
        video = self.sizes.in_channels - self.layout.latent[0]
        video_numbers = 2 * video * math.prod(self.layout.latent[1:])
        return int(texts * self.text * self.sizes.text_dim + self.image * (self.sizes.image_dim or 0) + video_numbers)


def _image_tokens(configs: shared.Configs) -> int:
    """Embeddings of one image: CLIP's patches and its class token."""
    if IMAGE_ENCODER not in configs:
        return 0
    encoder = configs[IMAGE_ENCODER]
    return int((encoder.get("image_size", 224) // encoder.get("patch_size", 32)) ** 2 + 1)


def _build(configs: shared.Configs) -> list[Any]:
    """Transformer, VAE, UMT5 and, where there is one, CLIP with fresh weights, from their config.json files."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    parts: list[nn.Module] = [
        WanTransformer3DModel.from_config(dict(configs[TRANSFORMER])),
        AutoencoderKLWan.from_config(dict(configs[VAE])),
        UMT5EncoderModel(UMT5Config.from_dict(dict(configs[TEXT_ENCODER]))),
    ]
    if IMAGE_ENCODER in configs:
        parts.append(CLIPVisionModel(CLIPVisionConfig.from_dict(dict(configs[IMAGE_ENCODER]))))
    return parts
