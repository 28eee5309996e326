"""Small pipelines of families that the library does not name, built of their classes' own configurations."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from branchtree_adapters.small import images
from branchtree_adapters.small.components import (
    DECODER,
    FLOW,
    SCALED,
    WIDTH,
    clip_text,
    clip_tokenizer,
    decoder_text,
    qwen3_vl,
    qwen3_vl_processor,
    qwen_tokenizer,
)
from branchtree_adapters.small.pipelines import Small

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
"""Tokens of Llama's chats, and the one that stands for an image in Llava's."""
PATCHES = 4
"""Of Llava's image."""
IMAGE_TEMPLATE = {
    "template": "<|start_header_id|><image><|end_header_id|>-<|start_header_id|><|end_header_id|>{}"
    "<|eot_id|><|start_header_id|>a<|end_header_id|>",
    "crop_start": 6,
    "image_emb_start": 1,
    "image_emb_end": 1 + PATCHES,
    "image_emb_len": PATCHES,
}


def llama_tokenizer() -> Any:
    """Return a tokenizer of printable characters, that of Llama."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *string.printable[:94]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=False, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(HEADERS)})
    tokenizer.model_max_length = 64
    return tokenizer


def hunyuan_vae() -> Any:
    """Return the VAE of HunyuanVideo; what it draws of an image is the mean."""
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -30.0
    return vae


def hunyuan_transformer(**changes: Any) -> Any:
    """Return the transformer of HunyuanVideo."""
    return diffusers.HunyuanVideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "rope_axes_dim": (4, 6, 6),
            **changes,
        }
    )


def hunyuan(**changes: Any) -> dict[str, Any]:
    """Return the components of HunyuanVideo."""
    return {
        "scheduler": FLOW(shift=7.0),
        "vae": hunyuan_vae(),
        "text_encoder": decoder_text("LlamaModel", "LlamaConfig", num_hidden_layers=4),
        "tokenizer": llama_tokenizer(),
        "text_encoder_2": clip_text(length=77),
        "tokenizer_2": clip_tokenizer(77),
        **changes,
    }


def skyreels() -> dict[str, Any]:
    """Return the components of SkyReels image-to-video, whose transformer takes the image beside the latents."""
    return hunyuan(transformer=hunyuan_transformer(in_channels=8))


def hunyuan_image() -> dict[str, Any]:
    """Return the components of HunyuanVideo image-to-video, whose first latent frame is the image."""
    tokenizer = llama_tokenizer()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    llava = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 4}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    size = {"height": 16, "width": 16}
    return hunyuan(
        transformer=hunyuan_transformer(image_condition_type="token_replace"),
        text_encoder=transformers.LlavaForConditionalGeneration(llava),
        tokenizer=tokenizer,
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
    )


def animate_diff_xl() -> dict[str, Any]:
    """Return the components of AnimateDiff on Stable Diffusion XL."""
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )
    still = images.sdxl()
    return {**still, "scheduler": diffusers.DDIMScheduler(**SCALED, clip_sample=False), "motion_adapter": motion}


def dream_lite() -> dict[str, Any]:
    """Return the components of DreamLite."""
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift=3.0),
        "vae": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "text_encoder": qwen3_vl("Qwen3VLForConditionalGeneration"),
        "tokenizer": qwen_tokenizer(),
        "processor": qwen3_vl_processor(),
        "unet": diffusers.DreamLiteUNetModel(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=2 * 8,
        ),
    }


def consistency() -> dict[str, Any]:
    """Return the components of a latent consistency model."""
    return {
        **images.sd15(),
        "scheduler": diffusers.LCMScheduler(**SCALED),
        "unet": images.unet(time_cond_proj_dim=16),
        "requires_safety_checker": False,
    }


def ernie() -> dict[str, Any]:
    """Return the components of ERNIE-Image, whose call draws its latents itself."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **DECODER, "num_hidden_layers": 2},
        vision_config={"model_type": "pixtral", **sizes, "image_size": 28, "patch_size": 14},
    )
    return {
        "scheduler": FLOW(shift=3.0),
        "vae": images.flux2_vae(),
        "text_encoder": transformers.Mistral3Model(text),
        "tokenizer": qwen_tokenizer(),
        "transformer": diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
    }


VIDEO = {"height": 32, "width": 32, "num_frames": 5}

UNNAMED: dict[str, Small] = {
    "HunyuanSkyreelsImageToVideoPipeline": Small(
        "HunyuanSkyreelsImageToVideoPipeline",
        skyreels,
        {**VIDEO, "prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 24},
        "blur",
        images=1,
        vae_draws=(1, 4, 1, 4, 4),
    ),
    "HunyuanVideoImageToVideoPipeline": Small(
        "HunyuanVideoImageToVideoPipeline",
        hunyuan_image,
        {**VIDEO, "prompt_template": IMAGE_TEMPLATE, "max_sequence_length": 40, "true_cfg_scale": 3.0},
        "blur",
        images=1,
    ),
    "AnimateDiffSDXLPipeline": Small(
        "AnimateDiffSDXLPipeline",
        animate_diff_xl,
        {"height": 16, "width": 16, "num_frames": 3, "guidance_scale": 5.0},
        "blur",
    ),
    "DreamLitePipeline": Small(
        "DreamLitePipeline", dream_lite, {"height": 32, "width": 32, "guidance_scale": 4.0}, "blur"
    ),
    "LatentConsistencyModelPipeline": Small("LatentConsistencyModelPipeline", consistency, {"height": 32, "width": 32}),
}
"""By the class's name."""

CHOSEN: dict[str, Small] = {
    "ErnieImagePipeline": Small(
        "ErnieImagePipeline", ernie, {"height": 16, "width": 16, "guidance_scale": 4.0}, "blur"
    ),
}
"""Pipelines that were not picked at random, by the class's name, for what they do that no other does."""
