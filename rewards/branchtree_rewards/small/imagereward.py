"""A tiny random ImageReward checkpoint in the published layout: ImageReward.pt, med_config.json and a vocabulary."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree_rewards.small.checkpoint import write_kept_settings

Shapes = dict[str, tuple[int, ...]]

IMAGE, PATCH = 32, 8
WIDTH, VISION_LAYERS, VISION_MLP = 128, 2, 64  # two attention heads, which are 64 wide in the published vision encoder
TEXT_LAYERS = 2  # as in data/small_imagereward.json
HEAD = {0: (24, 20), 2: (20, 14), 4: (14, 10), 6: (10, 6), 7: (6, 1)}  # widths in and out of linear layers, by index
PROJECTION = 16
SEED = 20230415


def write_small_imagereward(folder: Path) -> None:
    """Write the three files of a tiny checkpoint, always the same."""
    vocabulary = _vocabulary()
    # The published vocabulary has two entries more, which scoring never uses.
    sizes = write_kept_settings(folder, "imagereward", {"entries": len(vocabulary) + 2})["med_config.json"]
    generator = torch.Generator().manual_seed(SEED)
    state = {name: _random(name, shape, generator) for name, shape in _shapes(sizes).items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(sizes["max_position_embeddings"])[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")


def _vocabulary() -> list[str]:
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    later = [f"##{character}" for character in characters if character.isalnum()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *later]


def _shapes(sizes: dict[str, Any]) -> Shapes:
    """Return the published names of all parameters, with tiny shapes."""
    hidden = sizes["hidden_size"]
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes: Shapes = {
        f"{vision}cls_token": (1, 1, WIDTH),
        f"{vision}pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": (WIDTH,),
        f"{text}embeddings.word_embeddings.weight": (sizes["vocab_size"], hidden),
        f"{text}embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], hidden),
        **_layer(f"{vision}norm", WIDTH),
        **_layer(f"{text}embeddings.LayerNorm", hidden),
        **_layer("blip.vision_proj", WIDTH, PROJECTION),
        **_layer("blip.text_proj", hidden, PROJECTION),
    }
    for index, (width, out) in HEAD.items():
        shapes |= _layer(f"mlp.layers.{index}", width, out)
    for block in range(VISION_LAYERS):
        shapes |= _vision_block(f"{vision}blocks.{block}.")
    for block in range(TEXT_LAYERS):
        shapes |= _text_block(f"{text}encoder.layer.{block}.", hidden, sizes["intermediate_size"])
    return shapes


def _vision_block(block: str) -> Shapes:
    return {
        **_layer(f"{block}norm1", WIDTH),
        **_layer(f"{block}norm2", WIDTH),
        **_layer(f"{block}attn.qkv", WIDTH, 3 * WIDTH),
        **_layer(f"{block}attn.proj", WIDTH, WIDTH),
        **_layer(f"{block}mlp.fc1", WIDTH, VISION_MLP),
        **_layer(f"{block}mlp.fc2", VISION_MLP, WIDTH),
    }


def _text_block(block: str, hidden: int, intermediate: int) -> Shapes:
    shapes = {
        **_layer(f"{block}intermediate.dense", hidden, intermediate),
        **_layer(f"{block}output.dense", intermediate, hidden),
        **_layer(f"{block}output.LayerNorm", hidden),
    }
    for attention, source in (("attention", hidden), ("crossattention", WIDTH)):
        for layer, width in (("query", hidden), ("key", source), ("value", source)):
            shapes |= _layer(f"{block}{attention}.self.{layer}", width, hidden)
        shapes |= _layer(f"{block}{attention}.output.dense", hidden, hidden)
        shapes |= _layer(f"{block}{attention}.output.LayerNorm", hidden)
    return shapes


def _layer(name: str, width: int, out: int | None = None) -> Shapes:
    """Return the shapes of a linear layer's weight and bias, or of a norm's if ``out`` is not given."""
    return {f"{name}.weight": (width,) if out is None else (out, width), f"{name}.bias": (out or width,)}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw norms near 1, biases near 0, and matrices that keep the size of what they act on; no tensor is constant."""
    noise: Tensor = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise / 8 + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
    if "embed" in name and "proj" not in name:
        return noise / 2
    return noise / math.sqrt(noise[0].numel())
