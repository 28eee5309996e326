"""Small tokenizers, text encoders and VAEs, of which small pipelines are made."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import transformers

from branchtree_adapters.any_pipeline.byte_tokenizer import CHAT, SPECIAL, byte_tokenizer

WIDTH = 32
"""Channels of text embeddings."""

# Tokenizers


def qwen_tokenizer() -> Any:
    """Return a tokenizer over bytes, with the special tokens of Qwen."""
    return byte_tokenizer(1024)


def gemma_tokenizer(length: int = 64) -> Any:
    """Return a tokenizer of printable characters."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:94], "\n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip_tokenizer(length: int = 16) -> Any:
    """Return a tokenizer of letters and digits, that of CLIP."""
    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )


def t5_tokenizer(length: int = 24) -> Any:
    """Return a tokenizer of letters and digits, that of T5."""
    pieces = ["▁", *string.ascii_lowercase, *string.digits, ",", "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


# Text encoders


def clip_text(kind: str = "CLIPTextModel", width: int = WIDTH, length: int = 16) -> Any:
    """Return a text encoder of CLIP, of the class ``kind``."""
    config = transformers.CLIPTextConfig(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return getattr(transformers, kind)(config)


def t5_text(kind: str = "T5EncoderModel", vocabulary: int = 64) -> Any:
    """Return a text encoder of T5 or UMT5."""
    config_class = transformers.UMT5Config if kind.startswith("UMT5") else transformers.T5Config
    config = config_class(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_ff=48,
        d_kv=16,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, kind)(config)


DECODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 16,
}


def decoder_text(kind: str, config: str, **changes: Any) -> Any:
    """Return a text encoder of the decoder-only class ``kind``."""
    return getattr(transformers, kind)(getattr(transformers, config)(**{**DECODER, **changes}))


def qwen_vl_config() -> Any:
    """Return the configuration of a small Qwen2.5-VL."""
    token = {piece: 257 + i for i, piece in enumerate(SPECIAL)}
    return transformers.Qwen2_5_VLConfig(
        text_config={
            **{name: value for name, value in DECODER.items() if name != "head_dim"},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )


def qwen_vl() -> Any:
    """Return a small Qwen2.5-VL."""
    return transformers.Qwen2_5_VLForConditionalGeneration(qwen_vl_config())


def qwen3_vl(kind: str = "Qwen3VLModel", **changes: Any) -> Any:
    """Return a small Qwen3-VL, of the class ``kind``."""
    token = {piece: 257 + i for i, piece in enumerate(SPECIAL)}
    config = transformers.Qwen3VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
            **changes,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    return getattr(transformers, kind)(config)


def qwen3_vl_processor() -> Any:
    """Return a processor for small images, that of Qwen3-VL."""
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer=qwen_tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=CHAT,
    )


def qwen_vl_processor() -> Any:
    """Return a processor for small images, that of Qwen2-VL."""
    tokenizer = qwen_tokenizer()
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


# VAEs


def image_vae(channels: int = 4, levels: int = 2, **changes: Any) -> Any:
    """Return a VAE of images that halves sizes ``levels - 1`` times."""
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (8,) * levels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "latent_channels": channels,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.36,
            "shift_factor": 0.12,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **changes,
        }
    )


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
