"""Tiny random CLIP checkpoints in the two published layouts, and a tokenizer for them; all made without downloads.

Weights are drawn from a stream of their own, and no tensor is constant, so that every one of them matters to a score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree_rewards.clip.open_clip import CONFIG_FILE, OpenClipConfig, published_shapes
from branchtree_rewards.shared.pixels import CLIP_MEAN, CLIP_STD
from branchtree_rewards.shared.weights import State, build_pretrained, quiet_libraries

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 2 * 256 + 2
CONTEXT = 77
IMAGE, PATCH, WIDTH, HEADS, LAYERS, EMBED = 28, 14, 32, 2, 2, 24
LOG_SCALE = math.log(90)  # not the usual 100, so that assuming it shows


def write_clip_folder(folder: Path, seed: int) -> None:
    """Write a CLIPModel as `save_pretrained` does, with a tokenizer and a preprocessor configuration."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    depth = {"num_hidden_layers": LAYERS, "projection_dim": EMBED, "hidden_act": "quick_gelu"}
    ids = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    config = CLIPConfig(
        projection_dim=EMBED,
        text_config={"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **sizes, **depth, **ids},
        vision_config={"image_size": IMAGE, "patch_size": PATCH, **sizes, **depth},
    )
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    state = random_state({name: tensor.shape for name, tensor in wanted.items()}, seed)
    model = build_pretrained(CLIPModel, config, state, str(folder), torch.float32)
    with quiet_libraries():
        model.save_pretrained(folder)
    write_tokenizer(folder)
    write_preprocessor(folder)


def write_open_clip(folder: Path, weights: str, key: str | None, quick_gelu: bool, seed: int) -> None:
    """Write a checkpoint of open_clip, its configuration and a tokenizer.

    Args:
        folder: Where to.
        weights: Name of the weights file, which torch.save writes.
        key: Entry of the file that holds the state dict; None: the file is the state dict.
        quick_gelu: Which activation the configuration names.
        seed: Of the weights.
    """
    vision = {"image_size": IMAGE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    model = {"embed_dim": EMBED, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": model}, indent=2), encoding="utf-8")
    state = random_state(published_shapes(OpenClipConfig.model_validate(model)), seed)
    torch.save(state if key is None else {key: state}, folder / weights)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer whose vocabulary is the bytes, each also as the end of a word, with no merges."""
    symbols = _byte_symbols()
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in CLIP's and GPT-2's vocabularies, printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(rest)))]


def write_preprocessor(folder: Path) -> None:
    """Write preprocessor_config.json: the shorter side to the image size, then a square cut out of the middle."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True,
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def random_state(shapes: Mapping[str, Any], seed: int) -> State:
    """Random weights by name: matrices keep the size of what they act on, norms are near 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, torch.Size(shape), generator) for name, shape in shapes.items()}


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(LOG_SCALE)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        is_scale = name.endswith("weight")
        return 0.1 * noise + 1 if is_scale else 0.1 * noise
    return noise if "embedding" in name else noise / math.sqrt(shape[1:].numel())
