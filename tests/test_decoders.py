"""What decoding is planned to cost, against decoders that decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import tiny_wan
import torch
from branchtree_adapters.any_pipeline.measure import PeakMemory
from branchtree_adapters.flux import FLUX_DEV
from branchtree_adapters.pipeline.decoders import DecoderWeights, decoder_of_images, decoder_of_videos, decoder_weights
from diffusers import AutoencoderKL, AutoencoderKLWan
from garbage import no_collection
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from branchtree import plan
from branchtree.plugins import DecoderFootprint

ASSETS = Path(tiny_flux.__file__).parents[1] / "adapters" / "branchtree_adapters" / "assets"


def bundled(model: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((ASSETS / model / "vae" / "config.json").read_text())
    return settings


@torch.no_grad()
def measured(vae: Any, latents: torch.Tensor) -> tuple[float, int]:
    """Numbers alive at once that a second row adds, or of one where there is one row; and one row's operations."""
    peaks = [0]
    for rows in range(1, len(latents) + 1):
        with no_collection(), PeakMemory() as memory:
            vae.decode(latents[:rows], return_dict=False)
        peaks.append(memory.peak)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        vae.decode(latents[:1], return_dict=False)
    return (peaks[-1] - peaks[-2]) / 4, counter.get_total_flops()


def weights(vae: Any) -> DecoderWeights:
    found = decoder_weights(vae)
    assert found is not None
    return found


def require_close(decoder: DecoderFootprint, found: tuple[float, int], error: float) -> None:
    numbers, operations = found
    assert 1 - error < decoder.numbers_per_row / numbers < 1 + error
    assert decoder.flops_per_row == operations


@pytest.mark.parametrize(
    "vae",
    [
        lambda: AutoencoderKL.from_config(bundled("digits_flux")),
        tiny_flux._vae,
        lambda: AutoencoderKL(
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            norm_num_groups=4,
        ),
    ],
    ids=["bundled", "even", "attention"],
)
def test_images(vae: Any) -> None:
    decoder = vae().eval()
    size = decoder_of_images(decoder.config, weights(decoder), (48, 64), 1)
    assert size.media_numbers_per_row == 3 * 48 * 64
    require_close(size, measured(decoder, torch.randn(2, 4, 12, 16)), 0.02)


@pytest.mark.parametrize(
    ("vae", "frames"),
    [
        (lambda: AutoencoderKLWan.from_config(bundled("moving_digits_wan")), 1),
        (lambda: AutoencoderKLWan.from_config(bundled("moving_digits_wan")), 3),
        (tiny_wan._vae, 2),
        (tiny_wan._vae, 3),
        (lambda: AutoencoderKLWan(base_dim=16, z_dim=4), 3),
    ],
)
def test_videos(vae: Any, frames: int) -> None:
    decoder = vae().eval()
    channels, scale = decoder.config.z_dim, decoder.config.scale_factor_spatial
    size = decoder_of_videos(decoder.config, weights(decoder), (channels, frames, 4, 6), 1)
    assert size.media_numbers_per_row == 3 * (4 * (frames - 1) + 1) * 24 * scale**2
    numbers, operations = measured(decoder, torch.randn(2, channels, frames, 4, 6))
    if frames < 3:  # the caches are not full, so that less is alive than planned
        assert numbers < size.numbers_per_row
        numbers = size.numbers_per_row
    require_close(size, (numbers, operations), 0.06)


def test_the_published_decoders_at_full_size() -> None:
    """On the meta device, where a decoding of 720 x 720 pixels, or of a video's nine frames, takes no memory."""
    with torch.device("meta"):
        images = AutoencoderKL.from_config(dict(FLUX_DEV.configs["vae/config.json"])).eval()
        videos = AutoencoderKLWan().eval()
        one, three = torch.empty(1, 16, 90, 90), torch.empty(1, 16, 3, 50, 80)
        of_images = decoder_of_images(images.config, weights(images), (720, 720), 1)
        require_close(of_images, measured(images, one), 0.005)
        of_videos = decoder_of_videos(videos.config, weights(videos), (16, 3, 50, 80), 1)
        require_close(of_videos, measured(videos, three), 0.005)


def test_the_recipes_decoders_are_planned() -> None:
    quiet = {"evaluation": None, "rewards": [{"reward": "digits"}], "data.prompts": ["a"]}
    image = plan("flux_t2i_branchgrpo", quiet).footprint.decoder
    assert image is not None and (image.rows, image.number_bytes) == (16, None)
    assert image.numbers_per_row == 768 * 720 * 720
    video = plan("wan_i2v_motion", {"rewards": [{"reward": "motion_smoothness"}], "evaluation": None}).footprint.decoder
    assert video is not None and (video.rows, video.number_bytes) == (1, 4)
    assert video.media_numbers_per_row == 3 * 53 * 400 * 640
