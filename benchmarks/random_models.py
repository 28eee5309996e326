"""Published architectures with random weights, made on the device that runs them: no download, no copy on the host.

The adapters are the library's own from ``predict`` to ``decode``. Only loading, which draws weights, and encoding,
which draws embeddings in place of text encoders' output, are other.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from branchtree_adapters.flux import FLUX_DEV, Flux, FluxConfig
from branchtree_adapters.pipeline import speed
from branchtree_adapters.pipeline.blueprint import TRANSFORMER, VAE
from branchtree_adapters.pipeline.sources import Configs
from branchtree_adapters.wan import Wan
from branchtree_adapters.wan_layout import WanConfig
from torch import Tensor

from branchtree.plugins import Condition, Conditioning

SEED = 0
FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # FLUX.1-dev's; they change no tensor's size


@dataclass(frozen=True)
class Execution:
    """How diffusers runs the transformer."""

    attention: str | None = None  # a back-end's name in diffusers; its default otherwise
    compiled: bool = False  # torch.compile of the repeated blocks


def build_at(device: torch.device, dtype: torch.dtype, build: Callable[[], Any]) -> Any:
    """The diffusers model that ``build`` makes, its random weights drawn on ``device`` in ``dtype``.

    What its class keeps in float32 when it loads a checkpoint is float32 here too.
    """
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            model = build()
        finally:
            torch.set_default_dtype(before)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval()


def embeddings(conditions: Sequence[Condition], shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """Standard normal numbers (P, *shape) on the CPU, the same for the same prompt and name."""
    rows = []
    for condition in conditions:
        source = torch.Generator().manual_seed(zlib.crc32(f"{name} {condition.prompt}".encode()))
        rows.append(torch.randn(shape, generator=source).to(dtype))
    return torch.stack(rows)


def _run_as(transformer: Any, execution: Execution) -> None:
    speed.set_attention(transformer, execution.attention)
    if execution.compiled:
        transformer.compile_repeated_blocks()


class RandomFlux(Flux):
    """A FLUX model of the configured architecture, with random weights and random prompts."""

    def __init__(self, config: FluxConfig, execution: Execution) -> None:
        super().__init__(config)
        self._execution = execution

    def load(
        self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        """Draw the transformer and the VAE on ``device``."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

        configs = self.blueprint.configs
        transformer, vae = dict(configs[TRANSFORMER]), {**configs[VAE], **FLUX_VAE}
        parts = {
            "transformer": build_at(device, denoiser_dtype, lambda: FluxTransformer2DModel.from_config(transformer)),
            "vae": build_at(device, dtype, lambda: AutoencoderKL.from_config(vae)).requires_grad_(False),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        self.take(FluxPipeline(**parts, **absent), device, denoiser_dtype)
        _run_as(self.denoiser, self._execution)

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Random embeddings in the shapes of T5's and CLIP's."""
        sizes = self.pipeline.transformer.config
        text = (self._text_tokens, sizes.joint_attention_dim)
        return {
            "prompt_embeds": embeddings(conditions, text, self.dtype, "text"),
            "pooled_prompt_embeds": embeddings(conditions, (sizes.pooled_projection_dim,), self.dtype, "pooled"),
        }


class RandomWan(Wan):
    """A Wan2.1 text-to-video model of the configured architecture, with random weights and random prompts."""

    def __init__(self, config: WanConfig, execution: Execution) -> None:
        super().__init__(config)
        self._execution = execution

    def load(
        self, device: torch.device, dtype: torch.dtype, denoiser_dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        """Draw the transformer and the VAE on ``device``."""
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

        configs = self.blueprint.configs
        transformer, vae = dict(configs[TRANSFORMER]), dict(configs[VAE])
        pipeline = WanPipeline(
            transformer=build_at(device, denoiser_dtype, lambda: WanTransformer3DModel.from_config(transformer)),
            vae=build_at(device, torch.float32, lambda: AutoencoderKLWan.from_config(vae)).requires_grad_(False),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            tokenizer=None,
            text_encoder=None,
        )
        self.take(pipeline, device, denoiser_dtype)
        _run_as(self.denoiser, self._execution)

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """Random embeddings in the shape of UMT5's."""
        shape = (self.config.max_sequence_length, self.pipeline.transformer.config.text_dim)
        names = ["prompt_embeds", *(["negative_prompt_embeds"] if self.config.guided else [])]
        return {name: embeddings(conditions, shape, self.dtype, name) for name in names}


SMALL_FLUX: Configs = {
    "transformer/config.json": {
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
    "vae/config.json": {**FLUX_DEV.configs["vae/config.json"], "block_out_channels": [32] * 4, "layers_per_block": 1},
    "text_encoder/config.json": {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
    "text_encoder_2/config.json": {"d_model": 64, "d_ff": 64, "num_heads": 2, "num_layers": 1},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 16},
}
"""FLUX.1-dev with fewer, narrower layers and a shorter text."""

SMALL_WAN: Configs = {
    "transformer/config.json": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "ffn_dim": 128,
        "text_dim": 32,
        "freq_dim": 32,
    },
    "vae/config.json": {"base_dim": 8, "num_res_blocks": 1, "z_dim": 16},
    "text_encoder/config.json": {"vocab_size": 32, "d_model": 32, "d_ff": 32, "num_heads": 2, "num_layers": 1},
}
"""Wan2.1 with fewer, narrower layers."""


def write_configs(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Write what the adapters read sizes from, a pipeline folder without weights; its path."""
    for name, content in {"model_index.json": {}, **configs}.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    return str(folder)
