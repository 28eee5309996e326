"""What tests ask of small pipelines."""

from __future__ import annotations

import torch
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.small.pipelines import Small
from PIL import Image


def picture(name: str) -> Image.Image:
    """Return an image of random colours, by a name, which also decides on its width."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((64 + 32 * (sum(name.encode()) % 2), 64), Image.Resampling.NEAREST)


def ask(family: Small, prompt: str, images: int | None = None) -> Asked:
    """Return a prompt with images of its own."""
    count = family.images if images is None else images
    made = [picture(f"{prompt} {i}") for i in range(count)]
    return Asked(prompt, family.negative, {"image": made if family.image_list else made[0]} if made else {})


def past_images(family: Small, generator: torch.Generator) -> torch.Generator:
    """Return a generator after what a condition's images draw from it."""
    if family.vae_draws:
        torch.randn(family.vae_draws, generator=generator)
    return generator
