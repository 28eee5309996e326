"""VideoAlign's model: Qwen2-VL without its language head, and a linear one read at three tokens; and its weights.

The published file is the state dict of a whole peft model of transformers 4.45: every name begins with
`base_model.model.`, the language model is called `model`, and its linear layers are split into `base_layer` and two
low-rank factors. Axis letters: B videos, L tokens, D hidden width.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree_rewards.qwen2vl.backbone import EMBEDDING, modern_names, states_at
from branchtree_rewards.qwen2vl.patches import Patches
from branchtree_rewards.shared.weights import State, require_finite_weights
from branchtree_rewards.videoalign.settings import Lora

HEAD = "rm_head.weight"
WRAPPER = "base_model.model."
SPLIT = re.compile(r"(?P<layer>.+)\.(?P<piece>base_layer\.weight|base_layer\.bias|lora_[AB]\.default\.weight)")
WEIGHT, BIAS, DOWN, UP = "base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"


class VideoAlignNetwork(nn.Module):
    """Maps tokens and patches to visual quality, motion quality and text alignment, as the publisher's `trainer.py`."""

    def __init__(self, backbone: Any, head: Tensor, reward_ids: tuple[int, ...]) -> None:
        """Keep the ``head`` (1 or 3, D) in float32, to read the states at the three tokens ``reward_ids``."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Parameter(head.float())
        self._reward_ids = reward_ids

    def forward(self, ids: Tensor, mask: Tensor, videos: Sequence[Patches]) -> Tensor:
        """Return scores (B, 3), float32, before normalisation.

        Args:
            ids: (B, L) int64, padded on the right; each row holds each reward token once.
            mask: (B, L), 1 on what is not padding.
            videos: B videos.
        """
        states = states_at(self.backbone, ids, mask, videos, "video", self._reward_ids)
        outputs = states @ self.head.T
        # A head of three rows has one for each token; a head of one row serves all.
        return outputs.diagonal(dim1=1, dim2=2) if len(self.head) > 1 else outputs.squeeze(2)


@dataclass(frozen=True)
class RewardWeights:
    """Weights under the names of transformers 5's Qwen2VLModel, and the head's."""

    backbone: State
    head: Tensor  # (outputs, hidden) float32

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return self.backbone[EMBEDDING].shape[0]


def reward_weights(state: Mapping[str, Tensor], lora: Lora | None, dtype: torch.dtype, where: str) -> RewardWeights:
    """Rename, drop what has no use, and fold the low-rank factors in.

    Args:
        state: The published state dict.
        lora: How the low-rank factors are scaled; None if there are none.
        dtype: The backbone's.
        where: The checkpoint's name in messages.

    Raises:
        RewardError: the head or the embedding is missing, or the factors are incomplete or of another shape. All other
            names and shapes are checked against the model they are loaded into.
    """
    named = modern_names(state, WRAPPER)
    for name in (HEAD, EMBEDDING):
        if name not in named:
            raise RewardError(f"'{where}' holds no weight that belongs at '{name}'; it is no VideoAlign checkpoint")
    head = named.pop(HEAD).float()
    if head.ndim != 2 or head.shape[0] not in {1, 3}:
        raise RewardError(f"'{where}' has a head of shape {tuple(head.shape)}; its rows must be 1 or 3")
    require_finite_weights({HEAD: head}, where)
    return RewardWeights(_folded(named, lora, dtype, where), head)


def _folded(state: State, lora: Lora | None, dtype: torch.dtype, where: str) -> State:
    """Return the state with W + scale B A for each split layer, all in ``dtype``, one layer at a time."""
    folded: State = {}
    layers: dict[str, State] = defaultdict(dict)
    for name, value in state.items():
        if split := SPLIT.fullmatch(name):
            layers[split["layer"]][split["piece"]] = value
        else:
            folded[name] = value.to(dtype)
    if layers and lora is None:
        raise RewardError(f"'{where}' holds low-rank weights, but its model_config.json has lora_enable false")
    for layer, pieces in layers.items():
        assert lora is not None
        if missing := sorted({WEIGHT, DOWN, UP} - pieces.keys()):
            raise RewardError(f"'{where}' lacks {', '.join(missing)} of the low-rank layer '{layer}'")
        rows, columns = pieces[WEIGHT].shape
        for name, shape in {DOWN: (lora.rank, columns), UP: (rows, lora.rank)}.items():
            found = tuple(pieces[name].shape)
            if found != shape:
                raise RewardError(f"'{where}': {layer}.{name} is {found}, not {shape} of rank {lora.rank}")
        low_rank = pieces[UP].float() @ pieces[DOWN].float()
        folded[f"{layer}.weight"] = (pieces[WEIGHT].float() + lora.scale * low_rank).to(dtype)
        if BIAS in pieces:
            folded[f"{layer}.bias"] = pieces[BIAS].to(dtype)
    return folded
