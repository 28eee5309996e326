"""Small FluxPipeline folders with random weights and locally built tokenizers."""

from __future__ import annotations

import atexit
import json
import shutil
import string
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

VAE_SCALE = 4
CLIP_TOKENS = 16
T5_TOKENS = 12


def tiny_flux(folder: Path, *, guidance_embeds: bool = True, dynamic_shift: bool = False, seed: int = 0) -> Path:
    """Write a complete FluxPipeline folder of about 0.1 million parameters, and return it."""
    return Path(shutil.copytree(_built(guidance_embeds, dynamic_shift, seed), folder / "pipeline"))


@cache
def _built(guidance_embeds: bool, dynamic_shift: bool, seed: int) -> Path:
    """The folder that others are copies of; it is there until the process ends."""
    kept = tempfile.TemporaryDirectory(prefix="tiny_flux_")
    atexit.register(kept.cleanup)
    folder = Path(kept.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=dynamic_shift, shift=3.0, base_image_seq_len=8, max_image_seq_len=64
            ),
            vae=_vae(),
            text_encoder=CLIPTextModel(_clip_config()).eval(),
            tokenizer=_clip_tokenizer(folder / "clip_files"),
            text_encoder_2=T5EncoderModel(_t5_config()).eval(),
            tokenizer_2=t5_tokenizer(folder / "t5_files"),
            transformer=_transformer(guidance_embeds),
        )
        pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _t5_config() -> T5Config:
    return T5Config(
        vocab_size=len(t5_vocabulary()),
        d_model=32,
        d_ff=48,
        d_kv=16,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )


def _clip_vocabulary() -> dict[str, int]:
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {piece: index for index, piece in enumerate(pieces)}


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(_clip_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def t5_vocabulary() -> list[tuple[str, float]]:
    words = ["▁a", "▁digit", "▁red", "▁blue", "▁three", "▁seven"]
    pieces = [*words, "▁", *string.ascii_lowercase, *string.digits]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    tokenizer = Tokenizer(models.Unigram(t5_vocabulary(), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5TokenizerFast", "model_max_length": T5_TOKENS, "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0)
