"""Small pipelines that make videos: what each consists of."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines import ltx2

from branchtree_adapters.small.components import (
    DECODER,
    FLOW,
    WIDTH,
    decoder_text,
    gemma_tokenizer,
    qwen_tokenizer,
    qwen_vl_config,
    t5_text,
    t5_tokenizer,
)
from branchtree_adapters.small.images import kandinsky5


def wan_vae(**changes: Any) -> Any:
    """Return the VAE of Wan."""
    return diffusers.AutoencoderKLWan(
        **{
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [-0.3, 0.1, 0.4, -0.2],
            "latents_std": [0.5, 0.8, 1.3, 0.7],
            "scale_factor_temporal": 4,
            "scale_factor_spatial": 4,
            **changes,
        }
    )


def wan_transformer(**changes: Any) -> Any:
    """Return the transformer of Wan."""
    return diffusers.WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 64,
            **changes,
        }
    )


def wan(**changes: Any) -> dict[str, Any]:
    """Return the components of Wan."""
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_text("UMT5EncoderModel"),
        "vae": wan_vae(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": wan_transformer(),
        **changes,
    }


def wan_image(encoder: bool = False, **changes: Any) -> dict[str, Any]:
    """Return the components of Wan image-to-video; of 2.1 with an image encoder."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    size = {"height": 16, "width": 16}
    return wan(
        **{
            "transformer": wan_transformer(in_channels=12, image_dim=16 if encoder else None),
            "image_encoder": transformers.CLIPVisionModel(vision) if encoder else None,
            "image_processor": transformers.CLIPImageProcessor(size=size, crop_size=size) if encoder else None,
            **changes,
        }
    )


def wan_experts() -> dict[str, Any]:
    """Return the components of Wan2.2 with two experts."""
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.6)


def wan_expanded() -> dict[str, Any]:
    """Return the components of Wan2.2 whose first frame is given in place."""
    return wan_image(transformer=wan_transformer(), expand_timesteps=True)


def ltx() -> dict[str, Any]:
    """Return the components of LTX-Video."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05),
        "vae": diffusers.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        "text_encoder": t5_text(),
        "tokenizer": t5_tokenizer(),
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    }


def ltx_image() -> dict[str, Any]:
    """Return the components of LTX image-to-video."""
    made = ltx()
    with torch.no_grad():
        made["vae"].encoder.conv_out.conv.bias[-1] = -30.0  # what it draws of an image is the mean
    return made


def gemma3() -> Any:
    """Return a small Gemma 3, which sees images too."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**DECODER, "layer_types": ["full_attention"] * 2, "pad_token_id": 0},
            vision_config={**vision, "image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4,
        )
    )


def ltx2_audio() -> dict[str, Any]:
    """Return the components of LTX-2, which makes sound too."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05),
        "vae": diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, output_channels=2, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16
        ),
        "text_encoder": gemma3(),
        "tokenizer": gemma_tokenizer(),
        "connectors": ltx2.LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=16,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=4,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=16,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=4,
        ),
        "transformer": diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
            perturbed_attn=True,
        ),
        "vocoder": ltx2.LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
    }


def sana_video() -> dict[str, Any]:
    """Return the components of SanaVideo."""
    return {
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
        "vae": wan_vae(),
        "text_encoder": decoder_text("Gemma2Model", "Gemma2Config"),
        "tokenizer": gemma_tokenizer(),
        "transformer": diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            patch_size=(1, 1, 1),
            rope_max_seq_len=32,
        ),
    }


def mochi() -> dict[str, Any]:
    """Return the components of Mochi."""
    return {
        "scheduler": FLOW(invert_sigmas=True),
        "vae": diffusers.AutoencoderKLMochi(
            latent_channels=4,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=None,
            latents_std=None,
        ),
        "text_encoder": t5_text(),
        "tokenizer": t5_tokenizer(),
        "transformer": diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
    }


def hunyuan15() -> dict[str, Any]:
    """Return the components of HunyuanVideo 1.5."""
    return {
        "scheduler": FLOW(shift=7.0),
        "vae": diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        "text_encoder": transformers.Qwen2_5_VLTextModel(qwen_vl_config().text_config),
        "tokenizer": qwen_tokenizer(),
        "text_encoder_2": t5_text(vocabulary=400),
        "tokenizer_2": transformers.ByT5Tokenizer(),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        "transformer": diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=2 * 4 + 1,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
            target_size=16,
        ),
    }


def kandinsky5_video() -> dict[str, Any]:
    """Return the components of Kandinsky 5 video."""
    return kandinsky5(
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
    )
