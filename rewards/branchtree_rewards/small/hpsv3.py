"""A tiny random HPSv3 in the published layout: `HPSv3.safetensors`.

Beside the published file lie a `config.json`, which says how small the model is, and a tokenizer.
"""

from pathlib import Path

import torch

from branchtree_rewards.hpsv3.network import HEAD, QUESTION, WEIGHTS, empty_head
from branchtree_rewards.small.checkpoint import meta_shapes, random_state
from branchtree_rewards.small.qwen2vl import old_name, random_backbone, random_head, write_config, write_qwen_tokenizer

SEED = 20250803
SPREAD = 3.0  # of the last layer's weights


def write_small_hpsv3(folder: Path) -> None:
    """Write the checkpoint: the backbone in bfloat16 and the head in float32, as published."""
    from safetensors.torch import save_file

    config = write_config(folder, write_qwen_tokenizer(folder, QUESTION.template, QUESTION.reward_tokens))
    generator = torch.Generator().manual_seed(SEED)
    backbone = {old_name(name): value for name, value in random_backbone(config, generator).items()}
    backbone |= random_head(config, generator)
    head = random_state(meta_shapes(lambda: empty_head(config["hidden_size"])), generator)
    head["5.weight"] = SPREAD * head["5.weight"]
    stored = {name: value.to(torch.bfloat16) for name, value in backbone.items()}
    save_file({**stored, **{f"{HEAD}{name}": value for name, value in head.items()}}, folder / WEIGHTS)
