"""What decoding costs: memory alive at once and operations of the VAEs' decoders, from their configurations."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from branchtree.plugins import DecoderFootprint
from branchtree_adapters.pipeline.blueprint import count_parameters

WORKING = 27
"""Full-size tensors of ``base_dim`` channels for one frame that Wan's decoder works on at once, caches aside."""


def decoder_footprint(vae: Any, height: int, width: int, latent: tuple[int, ...], rows: int) -> DecoderFootprint | None:
    """Return the sizes of a VAE's decoder for latents (*latent), ``rows`` at once; None for an unknown kind."""
    from diffusers import AutoencoderKL, AutoencoderKLWan

    if isinstance(vae, AutoencoderKL):
        return decoder_of_images(vae, height, width, rows)
    return decoder_of_videos(vae, latent, rows) if isinstance(vae, AutoencoderKLWan) else None


def decoder_of_images(vae: Any, height: int, width: int, rows: int) -> DecoderFootprint:
    """Sizes of AutoencoderKL's decoder for an image of H x W pixels, ``rows`` at once.

    At a level k halvings below the image, whose blocks take C channels and give D, alive at once are the larger of
    3 C H W / 4^k numbers, the first block's input, normalised and activated, and (C + 4 D) H W / 4^k in a later one.
    Measured by following every tensor of a decoding: 0.3% above this for FLUX.1's at 720 x 720 pixels, and at most 2%
    for small ones. A convolution's workspace is not in it.
    """
    channels = [*vae.config.block_out_channels]
    inputs = [channels[-1], *reversed(channels[1:])]  # of each level, from the latents' to the image's
    halvings = [len(channels) - 1 - level for level in range(len(channels))]
    levels = zip(inputs, reversed(channels), halvings, strict=True)
    fullest = max(max(3 * taken, taken + 4 * given) / 4**below for taken, given, below in levels)
    pixels = height * width
    latents = pixels // 4 ** halvings[0]
    decoder = vae.decoder
    flops = _products([vae.post_quant_conv or nn.Identity(), decoder.conv_in, decoder.mid_block], latents)
    if vae.config.mid_block_add_attention:
        flops += 4.0 * latents**2 * channels[-1]
    for block, below in zip(decoder.up_blocks, halvings, strict=True):
        flops += _products([block.resnets], pixels // 4**below)
        flops += _products([block.upsamplers or nn.Identity()], 4 * pixels // 4**below)
    flops += _products([decoder.conv_out], pixels)
    return DecoderFootprint(
        parameters=count_parameters(vae),
        numbers_per_row=int(fullest * pixels),
        flops_per_row=flops,
        media_numbers_per_row=3 * pixels,
        rows=rows,
    )


def decoder_of_videos(vae: Any, latent: tuple[int, ...], rows: int) -> DecoderFootprint:
    """Sizes of AutoencoderKLWan's decoder, in float32, for latents (channels, frames, rows, columns), ``rows`` at once.

    It decodes one latent frame after the other, each to s frames of the video, and keeps two frames of the input of
    every causal convolution. With D = base_dim, multipliers m_0, m_1, ... from the video's size to the latents', n
    residual blocks a level, and f frames of H x W pixels decoded so far, alive at once are

        H W (D (27 m_0 + 2 m_0 + 4 (n + 1) sum_k m_k / 4^k) + 3 f)

    numbers: what works at the video's size, the caches, and the video. Measured by following every tensor of a
    decoding: within 0.2% of this for Wan2.1's, with s = 4, and within 6% for small ones; less than this for videos of
    fewer than three latent frames. A convolution's workspace is not in it.
    """
    config, (_, frames, height, width) = vae.config, latent
    multipliers, blocks = config.dim_mult, vae.decoder.up_blocks
    base = config.decoder_base_dim or config.base_dim
    pixels = height * width * 4 ** (len(multipliers) - 1)
    stride = 2 ** sum(config.temperal_downsample)
    shown = stride * (frames - 1) + 1
    caches = sum(factor / 4**level for level, factor in enumerate(multipliers)) * 4 * (config.num_res_blocks + 1)
    chunk = base * ((WORKING / 4 * stride + 2) * multipliers[0] + caches)
    area, made = height * width, frames
    flops = _products([vae.post_quant_conv, vae.decoder.conv_in, vae.decoder.mid_block], area * made)
    flops += 4.0 * area**2 * base * multipliers[-1] * made  # attention, of each frame by itself
    for block, temporal in zip(blocks, [*reversed(config.temperal_downsample), False], strict=True):
        flops += _products([block.resnets], area * made)
        for upsampler in block.upsamplers or ():
            if temporal:
                flops += _products([upsampler.time_conv], area * (made - 1))
                made = 2 * made - 1
            area *= 4
            flops += _products([upsampler.resample], area * made)
    flops += _products([vae.decoder.conv_out], area * made)
    return DecoderFootprint(
        parameters=count_parameters(vae),
        numbers_per_row=int(pixels * (chunk + 3 * shown)),
        flops_per_row=flops,
        media_numbers_per_row=3 * shown * pixels,
        rows=rows,
        number_bytes=4,
    )


def _products(modules: list[Any], positions: int) -> float:
    """Operations of the modules' convolutions and linear layers at so many positions, an addition counted as one."""
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, kinds)]
    return 2.0 * positions * sum(math.prod(layer.weight.shape) for layer in layers)
