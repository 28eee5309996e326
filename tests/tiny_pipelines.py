"""Small pipelines of many diffusers families: random weights, real tokenizers over bytes or letters.

Each is a few hundred thousand numbers and is built in a second. Sizes are ours; classes are those of the published
models.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from branchtree_adapters.any_pipeline.driver import Asked
from diffusers.pipelines import ltx2
from PIL import Image
from torch import nn

WIDTH = 32
"""Of text embeddings."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Tokenizers


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)


def qwen_tokenizer(length: int = 1024) -> Any:
    vocabulary = {piece: i for i, piece in enumerate(byte_alphabet())}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=length)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer(length: int = 64) -> Any:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:94], "\n"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip_tokenizer(length: int = 16) -> Any:
    letters = [*string.ascii_lowercase, *string.digits, ",", "."]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )


def t5_tokenizer(length: int = 24) -> Any:
    pieces = ["▁", *string.ascii_lowercase, *string.digits, ",", "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


# Text encoders


def clip_text(kind: str = "CLIPTextModel", width: int = WIDTH, length: int = 16) -> nn.Module:
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


def t5_text(kind: str = "T5EncoderModel", vocabulary: int = 64) -> nn.Module:
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


def decoder_text(kind: str, config: str, **changes: Any) -> nn.Module:
    return getattr(transformers, kind)(getattr(transformers, config)(**{**DECODER, **changes}))


def qwen_vl_config() -> Any:
    token = {piece: 256 + i for i, piece in enumerate(QWEN_SPECIAL)}
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


def qwen_vl() -> nn.Module:
    return transformers.Qwen2_5_VLForConditionalGeneration(qwen_vl_config())


def qwen3_vl(kind: str = "Qwen3VLModel") -> nn.Module:
    token = {piece: 256 + i for i, piece in enumerate(QWEN_SPECIAL)}
    config = transformers.Qwen3VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4},
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
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64),
        tokenizer=qwen_tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=CHAT,
    )


def qwen_vl_processor() -> Any:
    tokenizer = qwen_tokenizer()
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


# VAEs


def image_vae(channels: int = 4, levels: int = 2, **changes: Any) -> nn.Module:
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


def picture(name: str) -> Image.Image:
    """Return an image of random colours, by a name, which also decides on its width."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((64 + 32 * (sum(name.encode()) % 2), 64), Image.Resampling.NEAREST)


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class Tiny:
    """A small pipeline, the keywords that make small samples with it, and what its conditions hold."""

    pipeline: str
    components: Callable[[], Mapping[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None
    images: int = 0  # that a condition holds
    image_list: bool = False  # whether its call takes them as a list
    constants: Mapping[str, Any] = field(default_factory=dict)  # of its module, that would make images large
    vae_draws: tuple[int, ...] = ()  # the shape of what its VAE draws to encode a condition's image

    def asked(self, prompt: str, images: int | None = None) -> Asked:
        """Return a prompt with images of its own."""
        count = self.images if images is None else images
        made = [picture(f"{prompt} {i}") for i in range(count)]
        return Asked(prompt, self.negative, {"image": made if self.image_list else made[0]} if made else {})

    def past_images(self, generator: torch.Generator) -> torch.Generator:
        """Return a generator after what a condition's images draw from it."""
        if self.vae_draws:
            torch.randn(self.vae_draws, generator=generator)
        return generator

    def build(self, seed: int = 0) -> Any:
        """Return the pipeline, with weights from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = self.components()
            for part in parts.values():
                if isinstance(part, nn.Module):
                    part.eval().requires_grad_(False)
                    _spread(part)
            return getattr(diffusers, self.pipeline)(**parts)


def _spread(module: nn.Module) -> None:
    """Give weights that are initialised to zero small values, so that nothing that is tested is zero."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)


SQUARE = {"height": 32, "width": 32}
CLIP_VIT = {"text_encoder": lambda: clip_text("CLIPTextModelWithProjection")}


def _sd3() -> dict[str, Any]:
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


def _flux(**changes: Any) -> dict[str, Any]:
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


def _chroma() -> dict[str, Any]:
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


def qwen_image_vae() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0, 0.1, 0.2, -0.1],
        latents_std=[1.0, 1.1, 0.9, 1.2],
    )


def qwen_transformer(**changes: Any) -> nn.Module:
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


def _qwen_image() -> dict[str, Any]:
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": qwen_image_vae(),
        "text_encoder": qwen_vl(),
        "tokenizer": qwen_tokenizer(),
        "transformer": qwen_transformer(),
    }


def _qwen_edit() -> dict[str, Any]:
    return {**_qwen_image(), "processor": qwen_vl_processor()}


def _qwen_image_21() -> dict[str, Any]:
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


def _krea2() -> dict[str, Any]:
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


def ideogram4_transformer() -> nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=2 * WIDTH,
        mrope_section=(4, 2, 2),
    )


def _ideogram4() -> dict[str, Any]:
    return {
        "scheduler": FLOW(),
        "vae": flux2_vae(),
        "text_encoder": qwen3_vl(),
        "tokenizer": qwen_tokenizer(),
        "transformer": ideogram4_transformer(),
        "unconditional_transformer": ideogram4_transformer(),
    }


def _z_image() -> dict[str, Any]:
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


def flux2_vae() -> nn.Module:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def _flux2_klein() -> dict[str, Any]:
    return {
        "scheduler": FLOW(use_dynamic_shifting=True, shift=3.0),
        "vae": flux2_vae(),
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


def _sana() -> dict[str, Any]:
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


def _lumina2() -> dict[str, Any]:
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


def _cogview4() -> dict[str, Any]:
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


def _aura_flow() -> dict[str, Any]:
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


def _pixart() -> dict[str, Any]:
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


def unet(**changes: Any) -> nn.Module:
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


def _sdxl() -> dict[str, Any]:
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


def _sd15() -> dict[str, Any]:
    return {
        "scheduler": diffusers.DDIMScheduler(**SCALED, clip_sample=False),
        "vae": image_vae(shift_factor=None),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(),
        "safety_checker": None,
        "feature_extractor": None,
    }


# Videos


def wan_vae(**changes: Any) -> nn.Module:
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


def wan_transformer(**changes: Any) -> nn.Module:
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


def _wan(**changes: Any) -> dict[str, Any]:
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


def _wan_image(encoder: bool = False, **changes: Any) -> dict[str, Any]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    size = {"height": 16, "width": 16}
    return _wan(
        **{
            "transformer": wan_transformer(in_channels=12, image_dim=16 if encoder else None),
            "image_encoder": transformers.CLIPVisionModel(vision) if encoder else None,
            "image_processor": transformers.CLIPImageProcessor(size=size, crop_size=size) if encoder else None,
            **changes,
        }
    )


def _wan_experts() -> dict[str, Any]:
    return _wan(transformer_2=wan_transformer(), boundary_ratio=0.6)


def _wan_expanded() -> dict[str, Any]:
    return _wan_image(transformer=wan_transformer(), expand_timesteps=True)


def _ltx() -> dict[str, Any]:
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


def _ltx_image() -> dict[str, Any]:
    made = _ltx()
    with torch.no_grad():
        made["vae"].encoder.conv_out.conv.bias[-1] = -30.0  # what it draws of an image is the mean
    return made


def _ltx2() -> dict[str, Any]:
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
        "text_encoder": decoder_text(
            "Gemma3TextModel", "Gemma3TextConfig", layer_types=["full_attention"] * 2, pad_token_id=0
        ),
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


def _sana_video() -> dict[str, Any]:
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


def _mochi() -> dict[str, Any]:
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


def _hunyuan15() -> dict[str, Any]:
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


def _kandinsky5(**changes: Any) -> dict[str, Any]:
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


def _kandinsky5_video() -> dict[str, Any]:
    return _kandinsky5(
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
    )


VIDEO = {"height": 32, "width": 32, "num_frames": 5}
WAN = {**VIDEO, "guidance_scale": 4.0, "max_sequence_length": 24}
EDIT = {**SQUARE, "true_cfg_scale": 4.0}
SMALL_IMAGES = {"CONDITION_IMAGE_SIZE": 56 * 56, "VAE_IMAGE_SIZE": 32 * 32}

FAMILIES: dict[str, Tiny] = {
    "flux": Tiny("FluxPipeline", _flux, {**SQUARE, "max_sequence_length": 24}),
    "flux_true_cfg": Tiny("FluxPipeline", _flux, {**SQUARE, "max_sequence_length": 24, "true_cfg_scale": 3.0}, "blur"),
    "sd3": Tiny("StableDiffusion3Pipeline", _sd3, {**SQUARE, "max_sequence_length": 24, "guidance_scale": 4.0}, "blur"),
    "qwen_image": Tiny("QwenImagePipeline", _qwen_image, {**SQUARE, "true_cfg_scale": 4.0}, "blur"),
    "qwen_image_21": Tiny(
        "QwenImage21Pipeline", _qwen_image_21, {"height": 64, "width": 64, "true_cfg_scale": 4.0}, "blur"
    ),
    "krea2": Tiny("Krea2Pipeline", _krea2, {**SQUARE, "max_sequence_length": 200}, "blur"),
    "ideogram4": Tiny(
        "Ideogram4Pipeline",
        _ideogram4,
        {**SQUARE, "guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 80},
        constants={"QWEN3_VL_ACTIVATION_LAYERS": (0, 1)},
    ),
    "z_image": Tiny("ZImagePipeline", _z_image, {**SQUARE, "guidance_scale": 4.0, "cfg_truncation": 2.0}, "blur"),
    "flux2_klein": Tiny("Flux2KleinPipeline", _flux2_klein, {**SQUARE, "guidance_scale": 4.0}),
    "flux_kontext": Tiny(
        "FluxKontextPipeline",
        _flux,
        {**SQUARE, "max_sequence_length": 24, "max_area": 32 * 32, "_auto_resize": False},
        images=1,
    ),
    "qwen_edit_plus": Tiny("QwenImageEditPlusPipeline", _qwen_edit, EDIT, "blur", images=1, constants=SMALL_IMAGES),
    "qwen_edit_plus_two": Tiny(
        "QwenImageEditPlusPipeline", _qwen_edit, EDIT, "blur", images=2, image_list=True, constants=SMALL_IMAGES
    ),
    "flux2_klein_image": Tiny("Flux2KleinPipeline", _flux2_klein, {**SQUARE, "guidance_scale": 4.0}, images=1),
    "chroma": Tiny("ChromaPipeline", _chroma, {**SQUARE, "max_sequence_length": 24, "guidance_scale": 4.0}, "blur"),
    "sana": Tiny(
        "SanaPipeline",
        _sana,
        {**SQUARE, "guidance_scale": 4.0, "use_resolution_binning": False, "complex_human_instruction": None},
        "blur",
    ),
    "lumina2": Tiny("Lumina2Pipeline", _lumina2, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "cogview4": Tiny("CogView4Pipeline", _cogview4, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "aura_flow": Tiny("AuraFlowPipeline", _aura_flow, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "pixart": Tiny(
        "PixArtSigmaPipeline", _pixart, {**SQUARE, "guidance_scale": 4.0, "use_resolution_binning": False}, "blur"
    ),
    "sdxl": Tiny("StableDiffusionXLPipeline", _sdxl, {**SQUARE, "guidance_scale": 5.0}, "blur"),
    "sd15": Tiny("StableDiffusionPipeline", _sd15, {**SQUARE, "guidance_scale": 5.0}, "blur"),
    "wan": Tiny("WanPipeline", _wan, WAN, "blur"),
    "wan_experts": Tiny("WanPipeline", _wan_experts, {**WAN, "guidance_scale_2": 3.0}, "blur"),
    "wan_image": Tiny("WanImageToVideoPipeline", lambda: _wan_image(encoder=True), WAN, "blur", images=1),
    "wan_image_plain": Tiny("WanImageToVideoPipeline", _wan_image, WAN, "blur", images=1),
    "wan_image_expanded": Tiny("WanImageToVideoPipeline", _wan_expanded, WAN, "blur", images=1),
    "ltx_image": Tiny(
        "LTXImageToVideoPipeline",
        _ltx_image,
        {**VIDEO, "guidance_scale": 3.0, "max_sequence_length": 24},
        "blur",
        images=1,
        vae_draws=(1, 8, 1, 8, 8),
    ),
    "ltx": Tiny("LTXPipeline", _ltx, {**VIDEO, "guidance_scale": 3.0, "max_sequence_length": 24}, "blur"),
    "mochi": Tiny(
        "MochiPipeline", _mochi, {**VIDEO, "num_frames": 7, "guidance_scale": 3.0, "max_sequence_length": 16}, "blur"
    ),
    "hunyuan15": Tiny("HunyuanVideo15Pipeline", _hunyuan15, VIDEO, "blur"),
    "ltx2": Tiny(
        "LTX2Pipeline",
        _ltx2,
        {**VIDEO, "max_sequence_length": 24, "spatio_temporal_guidance_blocks": [1], "frame_rate": 25.0},
        "blur",
    ),
    "sana_video": Tiny(
        "SanaVideoPipeline",
        _sana_video,
        {**SQUARE, "frames": 5, "use_resolution_binning": False, "complex_human_instruction": None},
        "blur",
    ),
    "kandinsky5_video": Tiny("Kandinsky5T2VPipeline", _kandinsky5_video, {**VIDEO, "guidance_scale": 3.0}, "blur"),
    "kandinsky5": Tiny("Kandinsky5T2IPipeline", _kandinsky5, {**SQUARE, "guidance_scale": 3.0}, "blur"),
}
