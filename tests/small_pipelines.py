"""What tests ask of small pipelines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from branchtree_adapters.any_pipeline.asking import Asked
from branchtree_adapters.small.components import decoder_text, qwen3_vl
from branchtree_adapters.small.pipelines import PIPELINES, Small
from PIL import Image

SMALLER: Mapping[str, Mapping[str, Any]] = {
    "HunyuanVideo15Pipeline": {"tokenizer_max_length": 400, "tokenizer_2_max_length": 32},
    "Kandinsky5T2IPipeline": {"resolutions": [(32, 32)]},
}
"""Attributes that constructors of pipelines set for large models, and what is enough for small ones."""


def picture(name: str) -> Image.Image:
    """Return an image of random colours, by a name, which also decides on its width."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((64 + 32 * (sum(name.encode()) % 2), 64), Image.Resampling.NEAREST)


def shallow(name: str) -> Small:
    """Return a small pipeline, with few layers of a text encoder that has many only because its pipeline names them."""
    family = PIPELINES[name]
    if name == "flux2_klein":
        encoder = partial(decoder_text, "Qwen3ForCausalLM", "Qwen3Config", num_hidden_layers=4)
        call: dict[str, Any] = {**family.call, "text_encoder_out_layers": (1, 2, 3)}
        return replace(family, components=lambda: {**family.components(), "text_encoder": encoder()}, call=call)
    if name == "ideogram4":
        encoder, layers = partial(qwen3_vl, num_hidden_layers=13), {"QWEN3_VL_ACTIVATION_LAYERS": tuple(range(13))}
        return replace(family, components=lambda: {**family.components(), "text_encoder": encoder()}, constants=layers)
    return family


def ask(family: Small, prompt: str, images: int | None = None) -> Asked:
    """Return a prompt with images of its own."""
    count = family.images if images is None else images
    made = [picture(f"{prompt} {i}") for i in range(count)]
    return Asked(prompt, family.negative, {"image": made if family.image_list else made[0]} if made else {})


def options(name: str) -> dict[str, Any]:
    """Return the configuration of the adapter ``diffusers`` for a small pipeline."""
    return options_of(PIPELINES[name], f"small:{name}")


def options_of(family: Small, path: str) -> dict[str, Any]:
    """Return the configuration of the adapter ``diffusers`` for a small pipeline at ``path``."""
    call = dict(family.call)
    sizes = {"height": call.pop("height"), "width": call.pop("width")}
    frames = [call.pop(key) for key in ("num_frames", "frames") if key in call]
    images = {"images": family.images} if family.images else {}
    videos = {"frames": frames[0]} if frames else {}
    return {"path": path, "negative_prompt": family.negative, "call": call, **sizes, **images, **videos}


@contextmanager
def small_constants(family: Small) -> Iterator[None]:
    """A context in which the constants of a pipeline and its module are those that its small model needs."""
    kind = getattr(diffusers, family.pipeline)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in family.constants.items():
            patch.setattr(sys.modules[kind.__module__], name, value)
        for name, value in SMALLER.get(family.pipeline, {}).items():
            fixed = property(lambda pipeline, value=value: value, lambda pipeline, large: None)
            patch.setattr(kind, name, fixed, raising=False)
        yield


def past_images(family: Small, generator: torch.Generator) -> torch.Generator:
    """Return a generator after what a condition's images draw from it."""
    if family.vae_draws:
        torch.randn(family.vae_draws, generator=generator)
    return generator
