"""Tiny random weights for VBench's dimensions, in their published layouts; always the same."""

from pathlib import Path

import torch

from branchtree_rewards.small.checkpoint import meta_shapes, random_state
from branchtree_rewards.vbench.musiq import Musiq, MusiqSizes
from branchtree_rewards.vbench.raft import empty_raft

RAFT_FILE = "raft_large_C_T_V1-22a6c225.pth"  # as torchvision publishes it
MUSIQ_FILE = "musiq_spaq_ckpt-358bb6af.pth"  # as IQA-PyTorch publishes it, and VBench loads it
SIZES_FILE = "musiq.json"  # the sizes, where they are not the published ones
MUSIQ_SEED, RAFT_SEED = 2108, 2003
NARROW = 8
PACE = 0.0222  # of the small RAFT's flow
SMALL_MUSIQ = MusiqSizes(width=32, layers=2, heads=2, inner=48, stem=32, stem_out=32, grid=10, lengths=(40, 72))
MIDDLE, SPREAD = 50.0, 8.0  # of the small MUSIQ's scores


def write_small_raft(folder: Path) -> None:
    """Write RAFT at an eighth of its widths, as torchvision writes it. Its speeds are near VBench's least."""
    generator = torch.Generator().manual_seed(RAFT_SEED)
    state = random_state(meta_shapes(lambda: empty_raft(NARROW)), generator)
    state["update_block.flow_head.conv2.weight"] *= PACE
    state["update_block.flow_head.conv2.bias"] *= 0
    for name, tensor in state.items():
        if name.endswith("running_var"):
            state[name] = tensor.abs() + 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
    torch.save(state, folder / RAFT_FILE)


def write_small_musiq(folder: Path) -> None:
    """Write a MUSIQ of 60 thousand numbers and its sizes."""
    generator = torch.Generator().manual_seed(MUSIQ_SEED)
    state = random_state(meta_shapes(lambda: Musiq(SMALL_MUSIQ)), generator, unscaled="embedding")
    state["head.weight"] = state["head.weight"] * SPREAD
    state["head.bias"] = torch.tensor([MIDDLE])
    torch.save(state, folder / MUSIQ_FILE)
    (folder / SIZES_FILE).write_text(SMALL_MUSIQ.model_dump_json(indent=2), encoding="utf-8")
