"""From the state dict that VideoAlign's trainer saved to the weights of a plain Qwen2-VL and a head.

The file is a whole peft model of transformers 4.45: every name begins with `base_model.model.`, the language model is
called `model`, and its linear layers are split into `base_layer` and two low-rank factors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree_rewards.shared.weights import State, renamed, require_finite_weights, without
from branchtree_rewards.videoalign.settings import Lora

DROPPED = ("lm_head.weight",)  # a reward writes no text
HEAD = "rm_head.weight"
EMBEDDING = "language_model.embed_tokens.weight"
WRAPPER = "base_model.model."
SPLIT = re.compile(r"(?P<layer>.+)\.(?P<part>base_layer\.weight|base_layer\.bias|lora_[AB]\.default\.weight)")
WEIGHT, BIAS, DOWN, UP = "base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"


@dataclass(frozen=True)
class RewardWeights:
    """Weights under the names of transformers 5's Qwen2VLModel, and the head's."""

    backbone: State
    head: Tensor  # (outputs, hidden) float32

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.backbone[EMBEDDING].shape[0]


def reward_weights(state: Mapping[str, Tensor], lora: Lora | None, dtype: torch.dtype, where: str) -> RewardWeights:
    """Rename, drop what has no use, and fold the low-rank factors in.

    Raises RewardError if the head or the embedding is missing, or the factors are incomplete or of another shape. All
    other names and shapes are checked against the model they are loaded into.
    """
    named = without(renamed(state, _modern_name), DROPPED)
    for name in (HEAD, EMBEDDING):
        if name not in named:
            raise RewardError(f"'{where}' holds no weight that belongs at '{name}'; it is no VideoAlign checkpoint")
    head = named.pop(HEAD).float()
    if head.ndim != 2 or head.shape[0] not in {1, 3}:
        raise RewardError(f"'{where}' has a head of shape {tuple(head.shape)}; its rows must be 1 or 3")
    require_finite_weights({HEAD: head}, where)
    return RewardWeights(_folded(named, lora, dtype, where), head)


def _modern_name(name: str) -> str:
    name = name.removeprefix(WRAPPER)
    return f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _folded(state: State, lora: Lora | None, dtype: torch.dtype, where: str) -> State:
    """The state with W + scale B A in place of each split layer, all in ``dtype``, one layer at a time."""
    folded: State = {}
    layers: dict[str, State] = defaultdict(dict)
    for name, value in state.items():
        if split := SPLIT.fullmatch(name):
            layers[split["layer"]][split["part"]] = value
        else:
            folded[name] = value.to(dtype)
    if layers and lora is None:
        raise RewardError(f"'{where}' holds low-rank weights, but its model_config.json has lora_enable false")
    for layer, parts in layers.items():
        assert lora is not None
        _check_parts(layer, parts, lora, where)
        low_rank = parts[UP].float() @ parts[DOWN].float()
        folded[f"{layer}.weight"] = (parts[WEIGHT].float() + lora.scale * low_rank).to(dtype)
        if BIAS in parts:
            folded[f"{layer}.bias"] = parts[BIAS].to(dtype)
    return folded


def _check_parts(layer: str, parts: State, lora: Lora, where: str) -> None:
    if missing := sorted({WEIGHT, DOWN, UP} - parts.keys()):
        raise RewardError(f"'{where}' lacks {', '.join(missing)} of the low-rank layer '{layer}'")
    rows, columns = parts[WEIGHT].shape
    wanted = {DOWN: (lora.rank, columns), UP: (rows, lora.rank)}
    for part, shape in wanted.items():
        if tuple(parts[part].shape) != shape:
            raise RewardError(
                f"'{where}': {layer}.{part} is {tuple(parts[part].shape)}, not {shape} of rank {lora.rank}"
            )
