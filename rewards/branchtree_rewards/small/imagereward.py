"""A tiny random ImageReward checkpoint in the published layout: ImageReward.pt, med_config.json and a vocabulary."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from branchtree_rewards.shared.source import bundled_json
from branchtree_rewards.small.checkpoint import write_kept_settings

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
    shapes = bundled_json("small_imagereward_shapes.json")  # by the published names
    state = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(sizes["max_position_embeddings"])[None]
    torch.save(state, folder / "ImageReward.pt")


def _random(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw norms near 1, biases near 0, and matrices that keep the size of what they act on; no tensor is constant."""
    noise: Tensor = torch.randn(tuple(shape), generator=generator)
    if len(shape) == 1:
        return noise / 8 + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
    if "embed" in name and "proj" not in name:
        return noise / 2
    return noise / math.sqrt(noise[0].numel())
