"""A tiny random VideoReward in the published layout: `model_config.json`, `checkpoint-7/model.pth`, its tokenizer.

Beside the published files lies a `config.json`, which says how small the model is.
"""

import json
from pathlib import Path
from typing import Any

import torch

from branchtree_rewards.shared.weights import State
from branchtree_rewards.small.random_weights import meta_shapes, random_state, random_tensor, write_json
from branchtree_rewards.videoalign.text import REWARD_TOKENS, VIDEO_PAD, template

SEED = 20250123
STEP = 7
RANK = 4
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
    config = _config(ids)
    write_json(folder / "config.json", config)
    write_json(folder / "model_config.json", _model_config(outputs))
    torch.save(_weights(config, outputs), checkpoint / "model.pth")


def _model_config(outputs: int) -> dict[str, Any]:
    """Return the published file's sections and values, for a model of this size."""
    return {
        "data_config": {
            "meta_data": "",
            "data_dir": "",
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": outputs,
            "use_special_tokens": True,
            "reward_token": "special",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"],
            "use_rslora": False,
        },
        "inference_config": {
            "VQ_mean": 3.6757,
            "VQ_std": 2.2476,
            "MQ_mean": 1.1646,
            "MQ_std": 1.3811,
            "TA_mean": 2.8105,
            "TA_std": 2.5121,
        },
    }


def _config(ids: dict[str, int]) -> dict[str, Any]:
    """Return a `config.json` in the flat form in which Qwen2-VL is published."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": WORDS + len(SPECIAL_TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids[VIDEO_PAD],
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


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
