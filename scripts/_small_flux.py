"""What the scripts that build small FLUX pipelines share: their parts, the loss, and the folder."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from _small_models import rewrite_json, save_pipeline, write_clip_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from branchtree.core.grid import shift_sigmas
from branchtree.files.checksums import write_checksums

TIME_SHIFT = 3.0
SAMPLING_STEPS = 20


def build_clip_tokenizer(vocabulary: Sequence[str], max_length: int) -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer in which every word of `vocabulary` is one token, joined from left to right."""
    end = "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(symbol + end for symbol in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in vocabulary:
        for position in range(1, len(word)):
            symbol = word[position] + (end if position == len(word) - 1 else "")
            merges.append((word[:position], symbol))
            tokens.append(word[:position] + symbol)
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=max_length)
    for word in vocabulary:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    return tokenizer


def build_text_encoders(
    clip: CLIPTokenizer, t5: T5TokenizerFast, width: int, t5_layers: int = 1
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Return untrained encoders that fit the tokenizers, with heads of 16 channels."""
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=width // 16,
        max_position_embeddings=clip.model_max_length,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=t5_layers,
        num_heads=width // 16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
    )
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def build_vae(channels: Sequence[int], latent_channels: int, sample_size: int) -> AutoencoderKL:
    """Return an untrained VAE with a level for each of `channels`, which halves the sides but for the first."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=sample_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(latent_channels: int, text_width: int, single_layers: int) -> FluxTransformer2DModel:
    """Return an untrained FLUX transformer of 96 channels, with one double block, for latents packed 2x2."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=1,
        num_single_layers=single_layers,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=False,
        axes_dims_rope=(4, 10, 10),
    )


def assemble(
    vae: AutoencoderKL,
    tokenizers: tuple[CLIPTokenizer, T5TokenizerFast],
    encoders: tuple[CLIPTextModel, T5EncoderModel],
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    """Return a quiet pipeline of these components, with a fixed time shift."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def set_scale(vae: AutoencoderKL, latents: Tensor) -> None:
    """Set the shift and the scale of a VAE that standardise these latents."""
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def pack_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images (N, 3, H, W) in [-1, 1] to standardised packed latents (N, tokens, channels)."""
    latents = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def flow_loss(
    pipeline: FluxPipeline, latents: Tensor, grid: tuple[int, int], prompts: list[str], generator: torch.Generator
) -> Tensor:
    """Return the flow-matching loss on packed latents (B, rows * columns, channels) with one caption each."""
    tokens = pipeline.tokenizer_2.model_max_length
    embeds, pooled, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=tokens)
    image_ids = pipeline._prepare_latent_image_ids(len(latents), *grid, latents.device, latents.dtype)
    uniform = torch.rand(len(latents), generator=generator)
    sigma = shift_sigmas(uniform, TIME_SHIFT)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma[:, None, None])
    velocity = pipeline.transformer(
        hidden_states=noisy,
        timestep=sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents)


@torch.no_grad()
def sample(pipeline: FluxPipeline, prompts: list[str], size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return one image (3, H, W) in [0, 1] for each prompt."""
    images: Tensor = pipeline(
        prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=0.0,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=generator,
        output_type="pt",
    ).images
    return images


def save_flux(pipeline: FluxPipeline, output: Path) -> None:
    """Write the pipeline in a layout that transformers 4 and 5 read alike.

    From what transformers 5 writes, version 4 would load no CLIP tokenizer.
    """
    save_pipeline(pipeline, output, "tokenizer_2")
    write_clip_weights(pipeline.text_encoder, output / "text_encoder", "text_model")
    bpe = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())["model"]
    (output / "tokenizer/vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in bpe["merges"])
    (output / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    rewrite_json(output / "tokenizer/tokenizer_config.json", extra_special_tokens=None)
    rewrite_json(output / "vae/config.json", _name_or_path=None)  # a folder of this machine
    write_checksums(output)
