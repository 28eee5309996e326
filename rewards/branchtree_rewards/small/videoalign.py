"""A tiny random VideoReward in the published layout: `model_config.json`, `checkpoint-7/model.pth`, its tokenizer.

Beside the published files lies a `config.json`, which says how small the model is.
"""

import json
from pathlib import Path
from typing import Any

import torch

from branchtree_rewards.shared.weights import State
from branchtree_rewards.small.checkpoint import (
    meta_shapes,
    random_state,
    random_tensor,
    write_json,
    write_kept_settings,
)
from branchtree_rewards.videoalign.text import REWARD_TOKENS, VIDEO_PAD, template

SEED = 20250123
STEP = 7
RANK = 4  # as in data/small_videoalign.json
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", VIDEO_PAD, *REWARD_TOKENS),
)
WORDS = 1000  # entries of the vocabulary before the special tokens; enough to write the template in 840 tokens
ADAPTED = tuple(f"{kind}_proj.weight" for kind in ("q", "k", "v", "o", "gate", "up", "down"))


def write_small_videoalign(folder: Path, outputs: int = 1) -> None:
    """Write the checkpoint, with a head of ``outputs`` rows: 1 as published, or 3 as the public training script has."""
    checkpoint = folder / f"checkpoint-{STEP}"
    checkpoint.mkdir(parents=True)
    ids = _write_tokenizer(checkpoint / "tokenizer")
    settings = write_kept_settings(folder, "videoalign", ids)
    settings["model_config.json"]["model_config"]["output_dim"] = outputs
    write_json(folder / "model_config.json", settings["model_config.json"])
    torch.save(_weights(settings["config.json"], outputs), checkpoint / "model.pth")


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level tokenizer that knows the template's words, and return the ids of the special tokens."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        [template()], BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.save_pretrained(folder)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}


def _weights(config: dict[str, Any], outputs: int) -> State:
    """Return a random state dict under the names that peft gives a Qwen2-VL of transformers 4.45, in bfloat16."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    shapes = meta_shapes(lambda: Qwen2VLModel(Qwen2VLConfig.from_dict(config)))
    generator = torch.Generator().manual_seed(SEED)
    state = published_names(random_state(shapes, generator, unscaled="embed_tokens"))
    width, rows = config["hidden_size"], config["vocab_size"]
    state["base_model.model.lm_head.weight"] = random_tensor("lm_head", (rows, width), generator)
    for name in [name for name in state if name.endswith("base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        out, into = state[name].shape
        state[f"{layer}.lora_A.default.weight"] = random_tensor("lora_A", (RANK, into), generator)
        state[f"{layer}.lora_B.default.weight"] = random_tensor("lora_B", (out, RANK), generator)
    state["base_model.model.rm_head.weight"] = 4 * random_tensor("rm_head", (outputs, width), generator)
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def published_names(state: State) -> State:
    """Rename tensors of transformers 5's Qwen2VLModel as the published checkpoint has them beside low-rank factors."""
    published = {}
    for name, value in state.items():
        of_language = name.startswith("language_model.")
        old = name.replace("language_model.", "model.", 1) if of_language else name
        layer, _, kind = old.rpartition(".")
        adapted = of_language and f"{layer}.weight".endswith(ADAPTED)
        published[f"base_model.model.{layer}.base_layer.{kind}" if adapted else f"base_model.model.{old}"] = value
    return published
