"""A tiny random ImageReward checkpoint in the published layout: ImageReward.pt, med_config.json and a vocabulary."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree_rewards.small.checkpoint import write_kept_settings

IMAGE, PATCH = 32, 8
WIDTH, VISION_LAYERS, VISION_MLP = 128, 2, 64  # two attention heads, which are 64 wide in the published vision encoder
TEXT_LAYERS = 2  # as in data/small_imagereward.json
HEAD = {0: (24, 20), 2: (20, 14), 4: (14, 10), 6: (10, 6), 7: (6, 1)}  # widths in and out of linear layers, by index
PROJECTION = 16
SEED = 20230415


def write_small_imagereward(folder: Path) -> None:
    """Write the three files of a tiny checkpoint, always the same."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    later = [f"##{character}" for character in characters if character.isalnum()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *later]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    # The published vocabulary has two entries more, which scoring never uses.
    sizes = write_kept_settings(folder, "imagereward", {"entries": len(vocabulary) + 2})["med_config.json"]
    generator = torch.Generator().manual_seed(SEED)
    state = {name: _random(name, shape, generator) for name, shape in _shapes(sizes).items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(sizes["max_position_embeddings"])[None]
    torch.save(state, folder / "ImageReward.pt")


def _shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the published names of all parameters, with tiny shapes."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    layers: dict[str, tuple[int, ...]] = {  # the width of a norm, or those in and out of a linear layer
        f"{vision}norm": (WIDTH,),
        f"{text}embeddings.LayerNorm": (hidden,),
        "blip.vision_proj": (WIDTH, PROJECTION),
        "blip.text_proj": (hidden, PROJECTION),
        **{f"mlp.layers.{index}": widths for index, widths in HEAD.items()},
    }
    for index in range(VISION_LAYERS):
        block = f"{vision}blocks.{index}."
        layers |= {f"{block}norm1": (WIDTH,), f"{block}norm2": (WIDTH,), f"{block}attn.qkv": (WIDTH, 3 * WIDTH)}
        layers |= {f"{block}attn.proj": (WIDTH, WIDTH)}
        layers |= {f"{block}mlp.fc1": (WIDTH, VISION_MLP), f"{block}mlp.fc2": (VISION_MLP, WIDTH)}
    for index in range(TEXT_LAYERS):
        block = f"{text}encoder.layer.{index}."
        layers |= {f"{block}intermediate.dense": (hidden, inner), f"{block}output.dense": (inner, hidden)}
        layers |= {f"{block}output.LayerNorm": (hidden,)}
        for attention, source in ((f"{block}attention.", hidden), (f"{block}crossattention.", WIDTH)):
            layers |= {f"{attention}self.query": (hidden, hidden), f"{attention}self.key": (source, hidden)}
            layers |= {f"{attention}self.value": (source, hidden), f"{attention}output.dense": (hidden, hidden)}
            layers |= {f"{attention}output.LayerNorm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, WIDTH),
        f"{vision}pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": (WIDTH,),
        f"{text}embeddings.word_embeddings.weight": (sizes["vocab_size"], hidden),
        f"{text}embeddings.position_embeddings.weight": (sizes["max_position_embeddings"], hidden),
    }
    for name, widths in layers.items():
        shapes |= {f"{name}.weight": widths[::-1], f"{name}.bias": widths[-1:]}
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw norms near 1, biases near 0, and matrices that keep the size of what they act on; no tensor is constant."""
    noise: Tensor = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise / 8 + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
    if "embed" in name and "proj" not in name:
        return noise / 2
    return noise / math.sqrt(noise[0].numel())
