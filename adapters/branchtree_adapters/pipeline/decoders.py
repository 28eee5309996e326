"""What decoding costs: memory alive at once and operations of the VAEs' decoders, from their configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from branchtree.plugins import DecoderFootprint

WORKING = 27
"""Full-size tensors of ``base_dim`` channels for one frame that Wan's decoder works on at once, caches aside."""


@dataclass(frozen=True)
class LevelWeights:
    """Weights of one level of a decoder, from the latents' size to the samples'."""

    blocks: int
    upsampling: int
    time: int = 0  # of what doubles the frames


@dataclass(frozen=True)
class DecoderWeights:
    """How many weights of convolutions and linear layers a VAE's decoder has, by the size that they work at."""

    videos: bool
    parameters: int  # of the whole VAE
    first: int  # at the latents' size, before the levels
    levels: tuple[LevelWeights, ...]
    last: int


def decoder_weights(vae: Any) -> DecoderWeights | None:
    """Count the weights of a VAE's decoder; None for an unknown kind."""
    from diffusers import AutoencoderKL, AutoencoderKLWan

    if not isinstance(vae, AutoencoderKL | AutoencoderKLWan):
        return None
    decoder, videos = vae.decoder, isinstance(vae, AutoencoderKLWan)
    return DecoderWeights(
        videos=videos,
        parameters=sum(parameter.numel() for parameter in vae.parameters()),
        first=_weights([vae.post_quant_conv or nn.Identity(), decoder.conv_in, decoder.mid_block]),
        levels=tuple(_level(block, videos) for block in decoder.up_blocks),
        last=_weights([decoder.conv_out]),
    )


def _level(block: Any, videos: bool) -> LevelWeights:
    upsamplers = [*(block.upsamplers or ())]
    if not videos:
        return LevelWeights(_weights([block.resnets]), _weights(upsamplers))
    times = [upsampler.time_conv for upsampler in upsamplers if hasattr(upsampler, "time_conv")]
    return LevelWeights(_weights([block.resnets]), _weights([each.resample for each in upsamplers]), _weights(times))


def _weights(modules: list[Any]) -> int:
    """Count the weights of the modules' convolutions and linear layers."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, kinds)]
    return sum(math.prod(layer.weight.shape) for layer in layers)


def decoder_footprint(
    config: Mapping[str, Any], weights: DecoderWeights | None, size: tuple[int, int], latent: tuple[int, ...], rows: int
) -> DecoderFootprint | None:
    """Return the sizes of a decoder for samples of ``size`` (height, width) and latents (*latent), ``rows`` at once.

    None where the weights of its kind are not counted.
    """
    if weights is None:
        return None
    of_videos = weights.videos
    return (
        decoder_of_videos(config, weights, latent, rows)
        if of_videos
        else decoder_of_images(config, weights, size, rows)
    )


def decoder_of_images(
    config: Mapping[str, Any], weights: DecoderWeights, size: tuple[int, int], rows: int
) -> DecoderFootprint:
    """Sizes of AutoencoderKL's decoder for an image of H x W pixels, ``rows`` at once.

    At a level k halvings below the image, whose blocks take C channels and give D, alive at once are the larger of
    3 C H W / 4^k numbers, the first block's input, normalised and activated, and (C + 4 D) H W / 4^k in a later one.
    Measured by following every tensor of a decoding: 0.3% above this for FLUX.1's at 720 x 720 pixels, and at most 2%
    for small ones. A convolution's workspace is not in it.
    """
    channels = [*config["block_out_channels"]]
    inputs = [channels[-1], *reversed(channels[1:])]  # of each level, from the latents' to the image's
    halvings = [len(channels) - 1 - level for level in range(len(channels))]
    levels = zip(inputs, reversed(channels), halvings, strict=True)
    fullest = max(max(3 * taken, taken + 4 * given) / 4**below for taken, given, below in levels)
    pixels = size[0] * size[1]
    latents = pixels // 4 ** halvings[0]
    products = weights.first * latents + weights.last * pixels
    for level, below in zip(weights.levels, halvings, strict=True):
        products += level.blocks * (pixels // 4**below) + level.upsampling * (4 * pixels // 4**below)
    attention = 4.0 * latents**2 * channels[-1] if config["mid_block_add_attention"] else 0.0
    return DecoderFootprint(
        parameters=weights.parameters,
        numbers_per_row=int(fullest * pixels),
        flops_per_row=2.0 * products + attention,
        media_numbers_per_row=3 * pixels,
        rows=rows,
    )


def decoder_of_videos(
    config: Mapping[str, Any], weights: DecoderWeights, latent: tuple[int, ...], rows: int
) -> DecoderFootprint:
    """Sizes of AutoencoderKLWan's decoder, in float32, for latents (channels, frames, rows, columns), ``rows`` at once.

    It decodes one latent frame after the other, each to s frames of the video, and keeps two frames of the input of
    every causal convolution. With D = base_dim, multipliers m_0, m_1, ... from the video's size to the latents', n
    residual blocks a level, and f frames of H x W pixels decoded so far, alive at once are

        H W (D (27 m_0 + 2 m_0 + 4 (n + 1) sum_k m_k / 4^k) + 3 f)

    numbers: what works at the video's size, the caches, and the video. Measured by following every tensor of a
    decoding: within 0.2% of this for Wan2.1's, with s = 4, and within 6% for small ones; less than this for videos of
    fewer than three latent frames. A convolution's workspace is not in it.
    """
    _, frames, height, width = latent
    multipliers, temporal = config["dim_mult"], config["temperal_downsample"]
    base = config["decoder_base_dim"] or config["base_dim"]
    pixels = height * width * 4 ** (len(multipliers) - 1)
    stride = 2 ** sum(temporal)
    shown = stride * (frames - 1) + 1
    caches = sum(factor / 4**level for level, factor in enumerate(multipliers)) * 4 * (config["num_res_blocks"] + 1)
    chunk = base * ((WORKING / 4 * stride + 2) * multipliers[0] + caches)
    area, made = height * width, frames
    products = weights.first * area * made
    attention = 4.0 * area**2 * base * multipliers[-1] * made  # within each frame
    for level, doubles in zip(weights.levels, [*reversed(temporal), False], strict=True):
        products += level.blocks * area * made
        if level.upsampling:
            if doubles:
                products += level.time * area * (made - 1)
                made = 2 * made - 1
            area *= 4
            products += level.upsampling * area * made
    products += weights.last * area * made
    return DecoderFootprint(
        parameters=weights.parameters,
        numbers_per_row=int(pixels * (chunk + 3 * shown)),
        flops_per_row=2.0 * products + attention,
        media_numbers_per_row=3 * shown * pixels,
        rows=rows,
        number_bytes=4,
    )
