"""Qwen2-VL without its language head: the weights of fine-tuned models, and states read at reward tokens.

The published files have the names of transformers 4.45, in which the language model is called `model`. Axis letters:
B samples, L tokens, T reward tokens, D hidden width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree_rewards.qwen2vl.patches import Patches
from branchtree_rewards.shared.footprints import Skeleton, skeleton
from branchtree_rewards.shared.source import RANDOM_SMALL, WeightsSource, cause, file_at_hand, locate_weights
from branchtree_rewards.shared.weights import State, renamed, without

DROPPED = ("lm_head.weight",)  # a reward writes no text
EMBEDDING = "language_model.embed_tokens.weight"
CONFIG_FILE = "config.json"


def modern_names(state: Mapping[str, Tensor], wrapper: str = "") -> State:
    """Return tensors under the names of transformers 5's Qwen2VLModel, without the language head.

    ``wrapper`` is a prefix that may stand before the names. Raises RewardError if two come to the same name.
    """

    def modern(name: str) -> str:
        name = name.removeprefix(wrapper)
        return f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name

    return without(renamed(state, modern), DROPPED)


def read_architecture(source: WeightsSource, base: WeightsSource, vocabulary: int) -> Any:
    """Return the Qwen2VLConfig with the checkpoint's vocabulary, the reward tokens included.

    A local checkpoint may bring its own `config.json`; otherwise it is the base model's. Raises RewardError.
    """
    from transformers import Qwen2VLConfig

    own = source.maybe(CONFIG_FILE) if source.folder is not None else None
    file = own or base.find(CONFIG_FILE)
    try:
        architecture = Qwen2VLConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except Exception as error:  # the configuration's own checks raise many kinds
        raise RewardError(f"'{file}' is no configuration of Qwen2-VL ({cause(error)})") from error
    architecture.text_config.vocab_size = vocabulary
    return architecture


def round_frequencies(backbone: Any) -> None:
    """Round the frequencies of rotary embeddings to bfloat16, in their own precision.

    The publishers cast whole models, which in transformers 4.45 reaches the frequencies too: their models were trained
    so, and publish scores so. `from_pretrained` in bfloat16 leaves the frequencies in float32.
    """
    for name, buffer in backbone.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())


def backbone_skeleton(path: PathOrName, base: PathOrName, published: str, dtype: str) -> Skeleton:
    """Return the backbone without weights, of the checkpoint's own `config.json` or of its base model's.

    ``dtype`` is the reward's setting of that name.
    """
    own = file_at_hand(path, None, CONFIG_FILE)
    found = skeleton(path if own else base, None, published)
    return replace(found, number_bytes=4 if dtype == "float32" else 2)


def precision(dtype: str, device: torch.device) -> torch.dtype:
    """Return the backbone's precision for a reward's setting ``dtype``: "auto" is bfloat16, and float32 on a CPU."""
    on_cpu = "float32" if device.type == "cpu" else "bfloat16"
    chosen: torch.dtype = getattr(torch, on_cpu if dtype == "auto" else dtype)
    return chosen


def locate_base(base: PathOrName, write_small: Callable[[Path], None]) -> WeightsSource:
    """Return where the model that was fine-tuned is. Raises RewardError."""
    if base == RANDOM_SMALL:
        raise RewardError(
            "base 'random:small' is no model; only 'path' can be random, and then brings its own config.json"
        )
    return locate_weights(base, None, write_small)


def states_at(
    backbone: Any, ids: Tensor, mask: Tensor, looks: Sequence[Patches], kind: str, reward_ids: Sequence[int]
) -> Tensor:
    """Return the last states at the reward tokens (B, T, D), float32.

    Args:
        backbone: A Qwen2VLModel.
        ids: (B, L) int64, padded on the right; each row holds each reward token once.
        mask: (B, L), 1 on what is not padding.
        looks: B pictures or videos.
        kind: "image" or "video".
        reward_ids: T tokens.
    """
    pixels, grid = torch.cat([look.pixels for look in looks]), torch.tensor([look.grid for look in looks])
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    hidden = backbone(
        input_ids=ids,
        attention_mask=mask,
        # The publishers pass no positions, and transformers 4.45 then counts 0..L-1 on all three axes. Left to itself,
        # transformers 5 would compute M-RoPE, with which these checkpoints were not trained.
        position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
        use_cache=False,
        **dict(zip(names, (pixels, grid.to(ids.device)), strict=True)),
    ).last_hidden_state
    rows = torch.arange(len(ids), device=ids.device)
    columns = [(ids == reward_id).int().argmax(dim=1) for reward_id in reward_ids]
    return torch.stack([hidden[rows, column] for column in columns], dim=1).float()
