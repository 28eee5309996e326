"""A tiny random aesthetic predictor in the published layout: the linear head's file, and a CLIPModel in a folder."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from branchtree_rewards.small.clip import EMBED, write_clip_folder

HEAD = "sa_0_4_vit_l_14_linear.pth"
CLIP = "clip"
SEED = 20220816


def write_small_aesthetic(folder: Path) -> None:
    """Write the head's file and, in the folder "clip", the CLIPModel that it reads; always the same."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(1, EMBED, generator=generator) * 4 / math.sqrt(EMBED)
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, folder / HEAD)
    (folder / CLIP).mkdir()
    write_clip_folder(folder / CLIP, SEED)
