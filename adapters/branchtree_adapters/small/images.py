"""Small pipelines that make images: what each consists of."""

from __future__ import annotations

from typing import Any

import diffusers

from branchtree_adapters.small.components import (
    FLOW,
    SCALED,
    WIDTH,
    clip_text,
    clip_tokenizer,
    decoder_text,
    gemma_tokenizer,
    image_vae,
    qwen3_vl,
    qwen3_vl_processor,
    qwen_tokenizer,
    qwen_vl,
    qwen_vl_processor,
    t5_text,
    t5_tokenizer,
)


def sd3() -> dict[str, Any]:
    """Return the components of Stable Diffusion 3."""
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": image_vae(),
        "text_encoder": clip_text("CLIPTextModelWithProjection", WIDTH // 2),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text("CLIPTextModelWithProjection", WIDTH // 2),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_text(),
        "tokenizer_3": t5_tokenizer(),
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=WIDTH,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    }


def flux(**changes: Any) -> dict[str, Any]:
    """Return the components of FLUX.1."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift=3.0),
        "vae": image_vae(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_text(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": diffusers.FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "pooled_projection_dim": WIDTH,
                "guidance_embeds": True,
                "axes_dims_rope": (4, 6, 6),
                **changes,
            }
        ),
    }


def chroma() -> dict[str, Any]:
    """Return the components of Chroma."""
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": image_vae(),
        "text_encoder": t5_text(),
        "tokenizer": t5_tokenizer(),
        "transformer": diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
    }


def qwen_image_vae(**changes: Any) -> Any:
    """Return the VAE of Qwen-Image."""
    return diffusers.AutoencoderKLQwenImage(
        **{
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0, 0.1, 0.2, -0.1],
            "latents_std": [1.0, 1.1, 0.9, 1.2],
            **changes,
        }
    )


def qwen_transformer(**changes: Any) -> Any:
    """Return the transformer of Qwen-Image."""
    return diffusers.QwenImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
            **changes,
        }
    )


def qwen_image() -> dict[str, Any]:
    """Return the components of Qwen-Image."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": qwen_image_vae(),
        "text_encoder": qwen_vl(),
        "tokenizer": qwen_tokenizer(),
        "transformer": qwen_transformer(),
    }


def qwen_edit() -> dict[str, Any]:
    """Return the components of Qwen-Image-Edit.

    The pipeline scales images to a million pixels, so that the VAE must be quick, and leave few tokens of them.
    """
    vae = qwen_image_vae(base_dim=4, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5)
    return {**qwen_image(), "vae": vae, "processor": qwen_vl_processor()}


def qwen_image_21() -> dict[str, Any]:
    """Return the components of Qwen-Image-2.1."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0, 0.1, 0.2, -0.1],
            latents_std=[1.0, 1.1, 0.9, 1.2],
        ),
        "text_encoder": qwen3_vl("Qwen3VLForConditionalGeneration"),
        "processor": qwen3_vl_processor(),
        "transformer": diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def krea2() -> dict[str, Any]:
    """Return the components of Krea 2."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift=3.0),
        "vae": qwen_image_vae(),
        "text_encoder": qwen3_vl(),
        "tokenizer": qwen_tokenizer(),
        "text_encoder_select_layers": (1, 2),
        "transformer": diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=48,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def ideogram4_transformer() -> Any:
    """Return one of the two transformers of Ideogram 4."""
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=13 * WIDTH,
        mrope_section=(4, 2, 2),
    )


def ideogram4() -> dict[str, Any]:
    """Return the components of Ideogram 4."""
    return {
        "scheduler": FLOW(),
        "vae": flux2_vae(),
        "text_encoder": qwen3_vl(num_hidden_layers=36),  # some of which the pipeline names
        "tokenizer": qwen_tokenizer(),
        "transformer": ideogram4_transformer(),
        "unconditional_transformer": ideogram4_transformer(),
    }


def z_image() -> dict[str, Any]:
    """Return the components of Z-Image."""
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": image_vae(),
        "text_encoder": decoder_text("Qwen3Model", "Qwen3Config"),
        "tokenizer": qwen_tokenizer(),
        "transformer": diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
    }


def flux2_vae(levels: int = 2) -> Any:
    """Return the VAE of FLUX.2, which halves sizes ``levels - 1`` times."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def flux2_klein() -> dict[str, Any]:
    """Return the components of FLUX.2 klein."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift=3.0),
        "vae": flux2_vae(levels=4),
        "text_encoder": decoder_text("Qwen3ForCausalLM", "Qwen3Config", num_hidden_layers=28),
        "tokenizer": qwen_tokenizer(),
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    }


def sana() -> dict[str, Any]:
    """Return the components of Sana."""
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        "text_encoder": decoder_text("Gemma2Model", "Gemma2Config"),
        "tokenizer": gemma_tokenizer(),
        "transformer": diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=16,
        ),
    }


def lumina2() -> dict[str, Any]:
    """Return the components of Lumina 2."""
    return {
        "scheduler": FLOW(shift=6.0),
        "vae": image_vae(),
        "text_encoder": decoder_text("Gemma2Model", "Gemma2Config"),
        "tokenizer": gemma_tokenizer(),
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            scaling_factor=1.0,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(512, 32, 32),
            cap_feat_dim=WIDTH,
        ),
    }


def cogview4() -> dict[str, Any]:
    """Return the components of CogView4."""
    return {
        "scheduler": FLOW(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        "vae": image_vae(),
        "text_encoder": decoder_text("GlmModel", "GlmConfig", pad_token_id=0),
        "tokenizer": qwen_tokenizer(),
        "transformer": diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=16,
            condition_dim=4,
            sample_size=16,
        ),
    }


def aura_flow() -> dict[str, Any]:
    """Return the components of AuraFlow."""
    return {
        "scheduler": FLOW(shift=1.73),
        "vae": image_vae(),
        "text_encoder": t5_text("UMT5EncoderModel"),
        "tokenizer": t5_tokenizer(),
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=WIDTH,
            out_channels=4,
            pos_embed_max_size=64,
        ),
    }


def pixart() -> dict[str, Any]:
    """Return the components of PixArt-Sigma."""
    return {
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        "vae": image_vae(shift_factor=None),
        "text_encoder": t5_text(),
        "tokenizer": t5_tokenizer(),
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
    }


def unet(**changes: Any) -> Any:
    """Return a U-Net of Stable Diffusion."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 8,
            **changes,
        }
    )


def sdxl() -> dict[str, Any]:
    """Return the components of Stable Diffusion XL."""
    return {
        "scheduler": diffusers.EulerDiscreteScheduler(**SCALED),
        "vae": image_vae(shift_factor=None),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text("CLIPTextModelWithProjection"),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
    }


def sd15() -> dict[str, Any]:
    """Return the components of Stable Diffusion 1.5."""
    return {
        "scheduler": diffusers.DDIMScheduler(**SCALED, clip_sample=False),
        "vae": image_vae(shift_factor=None),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def kandinsky5(**changes: Any) -> dict[str, Any]:
    """Return the components of Kandinsky 5."""
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": image_vae(shift_factor=None),
        "text_encoder": qwen_vl(),
        "tokenizer": qwen_vl_processor(),
        "text_encoder_2": clip_text(length=77),
        "tokenizer_2": clip_tokenizer(77),
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            model_dim=32,
            ff_dim=48,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            patch_size=(1, 2, 2),
            visual_cond="vae" in changes,
        ),
        **changes,
    }
