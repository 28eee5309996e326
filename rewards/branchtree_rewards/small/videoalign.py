"""A tiny random VideoReward in the published layout: `model_config.json`, `checkpoint-7/model.pth`, its tokenizer.

Beside the published files lies a `config.json`, which says how small the model is.
"""

from pathlib import Path
from typing import Any

import torch

from branchtree_rewards.shared.weights import State
from branchtree_rewards.small.checkpoint import random_tensor, write_json, write_kept_settings
from branchtree_rewards.small.qwen2vl import (
    HEAD,
    old_name,
    random_backbone,
    random_head,
    write_config,
    write_qwen_tokenizer,
)
from branchtree_rewards.videoalign.text import question_form

SEED = 20250123
STEP = 7
RANK = 4  # as in data/small_videoalign.json
ADAPTED = tuple(f"{kind}_proj.weight" for kind in ("q", "k", "v", "o", "gate", "up", "down"))


def write_small_videoalign(folder: Path, outputs: int = 1) -> None:
    """Write the checkpoint, with a head of ``outputs`` rows: 1 as published, or 3 as the public training script has."""
    checkpoint = folder / f"checkpoint-{STEP}"
    checkpoint.mkdir(parents=True)
    form = question_form()
    ids = write_qwen_tokenizer(checkpoint / "tokenizer", form.template, form.reward_tokens)
    config = write_config(folder, ids)
    settings = write_kept_settings(folder, "videoalign")["model_config.json"]
    settings["model_config"]["output_dim"] = outputs
    write_json(folder / "model_config.json", settings)
    torch.save(_weights(config, outputs), checkpoint / "model.pth")


def _weights(config: dict[str, Any], outputs: int) -> State:
    """Return a random state dict under the names that peft gives a Qwen2-VL of transformers 4.45, in bfloat16."""
    generator = torch.Generator().manual_seed(SEED)
    state = published_names(random_backbone(config, generator))
    state[f"base_model.model.{HEAD}"] = random_head(config, generator)[HEAD]
    for name in [name for name in state if name.endswith("base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        out, into = state[name].shape
        state[f"{layer}.lora_A.default.weight"] = random_tensor("lora_A", (RANK, into), generator)
        state[f"{layer}.lora_B.default.weight"] = random_tensor("lora_B", (out, RANK), generator)
    state["base_model.model.rm_head.weight"] = 4 * random_tensor("rm_head", (outputs, config["hidden_size"]), generator)
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def published_names(state: State) -> State:
    """Rename tensors of transformers 5's Qwen2VLModel as the published checkpoint has them beside low-rank factors."""
    published = {}
    for name, value in state.items():
        old = old_name(name)
        layer, _, kind = old.rpartition(".")
        adapted = old != name and f"{layer}.weight".endswith(ADAPTED)
        published[f"base_model.model.{layer}.base_layer.{kind}" if adapted else f"base_model.model.{old}"] = value
    return published
