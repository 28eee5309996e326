"""Tiny random CLIP checkpoints in the two published layouts with a tokenizer, and an aesthetic head for one.

Weights are drawn from a stream of their own, and no tensor is constant, so that every one of them matters to a score.
"""

import json
import math
from pathlib import Path

import torch

from branchtree_rewards.clip.network import CONFIG_FILE, OpenClipConfig, published_shapes
from branchtree_rewards.shared.weights import State, build_pretrained, quiet_libraries
from branchtree_rewards.small.checkpoint import Shapes, meta_shapes, random_state, write_json, write_kept_settings

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 2 * 256 + 2
CONTEXT = 77
IMAGE, PATCH, WIDTH, HEADS, LAYERS, EMBED = 28, 14, 32, 2, 2, 24
LOG_SCALE = math.log(90)  # not the usual 100, so that assuming it shows
HEAD, CLIP = "sa_0_4_vit_l_14_linear.pth", "clip"  # LAION's aesthetic head, and the folder of its CLIP beside it
AESTHETIC_SEED = 20220816


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
    state = _clip_state(meta_shapes(lambda: CLIPModel(config)), seed)
    model = build_pretrained(CLIPModel, config, state, str(folder), torch.float32)
    with quiet_libraries():
        model.save_pretrained(folder)
    write_tokenizer(folder)
    write_kept_settings(folder, "clip")


def write_open_clip(folder: Path, weights: str, key: str | None, quick_gelu: bool, seed: int) -> None:
    """Write a checkpoint of open_clip, its configuration and a tokenizer.

    Args:
        folder: The folder to write to.
        weights: Name of the weights file, which torch.save writes.
        key: Entry of the file that holds the state dict; None: the file is the state dict.
        quick_gelu: Which activation the configuration names.
        seed: Determines the weights.
    """
    vision = {"image_size": IMAGE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    model = {"embed_dim": EMBED, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    write_json(folder / CONFIG_FILE, {"model_cfg": model})
    shapes = published_shapes(OpenClipConfig.model_validate(model))
    state = _clip_state(shapes, seed)
    torch.save(state if key is None else {key: state}, folder / weights)
    write_tokenizer(folder)


def _clip_state(shapes: Shapes, seed: int) -> State:
    drawn = {name: shape for name, shape in shapes.items() if name != "logit_scale"}
    state = random_state(drawn, torch.Generator().manual_seed(seed), unscaled="embedding")
    return {name: state[name] if name in state else torch.tensor(LOG_SCALE) for name in shapes}


def write_small_aesthetic(folder: Path) -> None:
    """Write the head's file and, in the folder "clip", the CLIPModel that it reads; always the same."""
    generator = torch.Generator().manual_seed(AESTHETIC_SEED)
    weight = torch.randn(1, EMBED, generator=generator) * 4 / math.sqrt(EMBED)
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, folder / HEAD)
    (folder / CLIP).mkdir()
    write_clip_folder(folder / CLIP, AESTHETIC_SEED)


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer whose vocabulary is the bytes, each also as the end of a word, with no merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_kept_settings(folder, "clip_tokenizer")
