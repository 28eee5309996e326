"""The small pipelines by name, as ``path: small:NAME`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from branchtree_adapters.small import images, videos


@dataclass(frozen=True)
class Small:
    """A small pipeline, the keywords that make small samples with it, and what its conditions hold."""

    pipeline: str
    components: Callable[[], Mapping[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = None
    images: int = 0  # that a condition holds
    image_list: bool = False  # whether its call takes them as a list
    constants: Mapping[str, Any] = field(default_factory=dict)  # of its module, that would make images large
    vae_draws: tuple[int, ...] = ()  # the shape of what its VAE draws to encode a condition's image

    def build(self, seed: int = 0) -> Any:
        """Return the pipeline, with weights from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            components = self.components()
            for component in components.values():
                if isinstance(component, nn.Module):
                    component.eval().requires_grad_(False)
                    _spread(component)
            return getattr(diffusers, self.pipeline)(**components)


def _spread(module: nn.Module) -> None:
    """Give weights that are initialised to zero small values, so that nothing that is tested is zero."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)


SQUARE: Mapping[str, Any] = {"height": 32, "width": 32}

VIDEO = {"height": 32, "width": 32, "num_frames": 5}
WAN = {**VIDEO, "guidance_scale": 4.0, "max_sequence_length": 24}
KLEIN = {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 128}
EDIT = {"height": 128, "width": 128, "true_cfg_scale": 4.0}
SMALL_IMAGES = {"CONDITION_IMAGE_SIZE": 56 * 56, "VAE_IMAGE_SIZE": 128 * 128}

PIPELINES: dict[str, Small] = {
    "flux": Small("FluxPipeline", images.flux, {**SQUARE, "max_sequence_length": 24}),
    "flux_true_cfg": Small(
        "FluxPipeline", images.flux, {**SQUARE, "max_sequence_length": 24, "true_cfg_scale": 3.0}, "blur"
    ),
    "sd3": Small(
        "StableDiffusion3Pipeline", images.sd3, {**SQUARE, "max_sequence_length": 24, "guidance_scale": 4.0}, "blur"
    ),
    "qwen_image": Small("QwenImagePipeline", images.qwen_image, {**SQUARE, "true_cfg_scale": 4.0}, "blur"),
    "qwen_image_21": Small(
        "QwenImage21Pipeline", images.qwen_image_21, {"height": 64, "width": 64, "true_cfg_scale": 4.0}, "blur"
    ),
    "krea2": Small("Krea2Pipeline", images.krea2, {**SQUARE, "max_sequence_length": 200}, "blur"),
    "ideogram4": Small(
        "Ideogram4Pipeline",
        images.ideogram4,
        {**SQUARE, "guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 120},
    ),
    "z_image": Small(
        "ZImagePipeline", images.z_image, {**SQUARE, "guidance_scale": 4.0, "cfg_truncation": 2.0}, "blur"
    ),
    "flux2_klein": Small("Flux2KleinPipeline", images.flux2_klein, KLEIN),
    "flux_kontext": Small(
        "FluxKontextPipeline",
        images.flux,
        {**SQUARE, "max_sequence_length": 24, "max_area": 32 * 32, "_auto_resize": False},
        images=1,
    ),
    "qwen_edit_plus": Small(
        "QwenImageEditPlusPipeline", images.qwen_edit, EDIT, "blur", images=1, constants=SMALL_IMAGES
    ),
    "qwen_edit_plus_two": Small(
        "QwenImageEditPlusPipeline", images.qwen_edit, EDIT, "blur", images=2, image_list=True, constants=SMALL_IMAGES
    ),
    "flux2_klein_image": Small("Flux2KleinPipeline", images.flux2_klein, KLEIN, images=1),
    "chroma": Small(
        "ChromaPipeline", images.chroma, {**SQUARE, "max_sequence_length": 24, "guidance_scale": 4.0}, "blur"
    ),
    "sana": Small(
        "SanaPipeline",
        images.sana,
        {**SQUARE, "guidance_scale": 4.0, "use_resolution_binning": False, "complex_human_instruction": None},
        "blur",
    ),
    "lumina2": Small("Lumina2Pipeline", images.lumina2, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "cogview4": Small("CogView4Pipeline", images.cogview4, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "aura_flow": Small("AuraFlowPipeline", images.aura_flow, {**SQUARE, "guidance_scale": 4.0}, "blur"),
    "pixart": Small(
        "PixArtSigmaPipeline", images.pixart, {**SQUARE, "guidance_scale": 4.0, "use_resolution_binning": False}, "blur"
    ),
    "sdxl": Small("StableDiffusionXLPipeline", images.sdxl, {**SQUARE, "guidance_scale": 5.0}, "blur"),
    "sd15": Small("StableDiffusionPipeline", images.sd15, {**SQUARE, "guidance_scale": 5.0}, "blur"),
    "wan": Small("WanPipeline", videos.wan, WAN, "blur"),
    "wan_experts": Small("WanPipeline", videos.wan_experts, {**WAN, "guidance_scale_2": 3.0}, "blur"),
    "wan_image": Small("WanImageToVideoPipeline", lambda: videos.wan_image(encoder=True), WAN, "blur", images=1),
    "wan_image_plain": Small("WanImageToVideoPipeline", videos.wan_image, WAN, "blur", images=1),
    "wan_image_expanded": Small("WanImageToVideoPipeline", videos.wan_expanded, WAN, "blur", images=1),
    "ltx_image": Small(
        "LTXImageToVideoPipeline",
        videos.ltx_image,
        {**VIDEO, "guidance_scale": 3.0, "max_sequence_length": 24},
        "blur",
        images=1,
        vae_draws=(1, 8, 1, 8, 8),
    ),
    "ltx": Small("LTXPipeline", videos.ltx, {**VIDEO, "guidance_scale": 3.0, "max_sequence_length": 24}, "blur"),
    "mochi": Small(
        "MochiPipeline",
        videos.mochi,
        {**VIDEO, "num_frames": 7, "guidance_scale": 3.0, "max_sequence_length": 16},
        "blur",
    ),
    "hunyuan15": Small("HunyuanVideo15Pipeline", videos.hunyuan15, VIDEO, "blur"),
    "ltx2": Small(
        "LTX2Pipeline",
        videos.ltx2_audio,
        {**VIDEO, "max_sequence_length": 24, "spatio_temporal_guidance_blocks": [1], "frame_rate": 25.0},
        "blur",
    ),
    "sana_video": Small(
        "SanaVideoPipeline",
        videos.sana_video,
        {**SQUARE, "frames": 5, "use_resolution_binning": False, "complex_human_instruction": None},
        "blur",
    ),
    "kandinsky5_video": Small(
        "Kandinsky5T2VPipeline", videos.kandinsky5_video, {**VIDEO, "guidance_scale": 3.0}, "blur"
    ),
    "kandinsky5": Small("Kandinsky5T2IPipeline", images.kandinsky5, {**SQUARE, "guidance_scale": 3.0}, "blur"),
}
