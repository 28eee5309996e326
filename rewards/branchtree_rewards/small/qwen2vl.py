"""A tiny Qwen2-VL for the small checkpoints of rewards that were fine-tuned from one: settings, tokenizer, weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from branchtree_rewards.qwen2vl.backbone import CONFIG_FILE
from branchtree_rewards.qwen2vl.questions import CHAT_TOKENS, IMAGE_PAD, VIDEO_PAD
from branchtree_rewards.shared.weights import State
from branchtree_rewards.small.checkpoint import (
    meta_shapes,
    random_state,
    random_tensor,
    write_json,
    write_kept_settings,
)

SPECIAL_TOKENS = ("<|endoftext|>", *CHAT_TOKENS, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
WORDS = 1000  # entries of the vocabulary before the special tokens, at most; enough to write a template shortly
HEAD = "lm_head.weight"


def write_qwen_tokenizer(folder: Path, text: str, reward_tokens: Sequence[str]) -> dict[str, int]:
    """Write a byte-level tokenizer that knows the words of ``text``, and return the ids of its special tokens."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator([text], BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    tokens = (*SPECIAL_TOKENS, *reward_tokens)
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        additional_special_tokens=list(tokens[1:]),
    )
    tokenizer.save_pretrained(folder)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}


def write_config(folder: Path, ids: dict[str, int]) -> dict[str, Any]:
    """Write the configuration for a tokenizer's special tokens, which come last, and return its content."""
    config: dict[str, Any] = write_kept_settings(folder, "qwen2vl", ids)[CONFIG_FILE]
    config["vocab_size"] = max(ids.values()) + 1
    write_json(folder / CONFIG_FILE, config)
    return config


def random_backbone(config: dict[str, Any], generator: torch.Generator) -> State:
    """Return random weights under the names of transformers 5's Qwen2VLModel."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    shapes = meta_shapes(lambda: Qwen2VLModel(Qwen2VLConfig.from_dict(config)))
    return random_state(shapes, generator, unscaled="embed_tokens")


def random_head(config: dict[str, Any], generator: torch.Generator) -> State:
    """Return a random language head, which published files hold and rewards drop."""
    return {HEAD: random_tensor("lm_head", (config["vocab_size"], config["hidden_size"]), generator)}


def old_name(name: str) -> str:
    """Return the name that a tensor of transformers 5's Qwen2VLModel has in published files."""
    return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name
