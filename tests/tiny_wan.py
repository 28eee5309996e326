"""Small Wan pipeline folders with random weights and locally built tokenizers, and frames for them to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tiny_flux import t5_tokenizer, t5_vocabulary
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

Z = 4
FRAMES, SIZE = 9, 32
LATENT = (Z, 3, 8, 8)
IMAGE_TOKENS, IMAGE_DIM = 5, 16


@dataclass(frozen=True)
class Kind:
    """Which small model: what it is for, and with which parts."""

    image_to_video: bool = True
    image_encoder: bool = False
    shared_attention: bool = False  # text and image embeddings go through the same projections
    both_images: bool = False  # as the first-and-last-frame checkpoint: position embeddings over both
    unipc: bool = False
    heads: int = 2


def tiny_wan(folder: Path, kind: Kind = Kind(), seed: int = 0) -> Path:
    """Write a complete pipeline folder of about 0.1 million parameters, and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "scheduler": _scheduler(kind.unipc),
            "vae": _vae(),
            "text_encoder": UMT5EncoderModel(_umt5_config()).eval(),
            "tokenizer": t5_tokenizer(folder / "t5_files"),
            "transformer": _transformer(kind),
        }
        if kind.image_encoder:
            parts |= {"image_encoder": CLIPVisionModel(_clip_config()).eval(), "image_processor": _image_processor()}
        pipeline = (WanImageToVideoPipeline if kind.image_to_video else WanPipeline)(**parts)
        pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def write_frame(file: Path, seed: int, width: int = SIZE, height: int = SIZE) -> Path:
    """Write a picture of smooth random colours, another one for each seed."""
    coarse = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    pixels = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(file)
    return file


def _scheduler(unipc: bool) -> FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler:
    if unipc:
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _transformer(kind: Kind) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=kind.heads,
        attention_head_dim=12,
        in_channels=2 * Z + 4 if kind.image_to_video else Z,
        out_channels=Z,
        text_dim=32,
        freq_dim=16,
        ffn_dim=24 * kind.heads,
        num_layers=2,
        image_dim=IMAGE_DIM if kind.image_encoder else None,
        added_kv_proj_dim=12 * kind.heads if kind.image_encoder and not kind.shared_attention else None,
        rope_max_seq_len=64,
        pos_embed_seq_len=2 * IMAGE_TOKENS if kind.both_images else None,
    ).eval()
    if kind.both_images:
        nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    return transformer


def _vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=Z,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[-0.3, 0.1, 0.4, -0.2],
        latents_std=[0.5, 0.8, 1.3, 0.7],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()
    with torch.no_grad():  # as initialised, everything decodes to grey
        vae.decoder.conv_out.weight.mul_(3)
        vae.encoder.conv_out.weight.mul_(3)
    return vae


def _umt5_config() -> UMT5Config:
    return UMT5Config(vocab_size=len(t5_vocabulary()), d_model=32, d_ff=48, d_kv=16, num_heads=2, num_layers=2)


def _clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
        initializer_factor=20.0,
    )


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
