"""HPSv3's question and model: Qwen2-VL without its language head, and a small network read at one token.

The published file is the state dict of a whole model of transformers 4.45, with the head's layers under `rm_head`.
The question is the publisher's (MizzenAI/HPSv3, `data_collator_qwen.py`, MIT licence), byte for byte. Axis letters:
B pictures, L tokens, D hidden width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from branchtree.errors import RewardError
from branchtree_rewards.qwen2vl.backbone import EMBEDDING, modern_names, states_at
from branchtree_rewards.qwen2vl.patches import Patches
from branchtree_rewards.qwen2vl.questions import IMAGE_PAD, QuestionForm
from branchtree_rewards.shared.source import bundled_text
from branchtree_rewards.shared.weights import State, load_strictly

WEIGHTS = "HPSv3.safetensors"
HEAD = "rm_head."  # before the names of the head's tensors
WIDTHS = (1024, 16)  # of the head's inner layers
QUESTION = QuestionForm("HPSv3", bundled_text("hpsv3_instruction.txt"), IMAGE_PAD, ("<|Reward|>",))


def empty_head(width: int) -> nn.Sequential:
    """Return the head for states of ``width`` numbers, its layers counted as in the published names."""
    first, second = WIDTHS
    return nn.Sequential(
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 2),
    )


class Hpsv3Network(nn.Module):
    """Maps tokens and patches to the mean of a picture's score and the logarithm of its standard deviation."""

    def __init__(self, backbone: Any, head: nn.Module, reward_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.head, self._reward_ids = backbone, head, reward_ids

    def forward(self, ids: Tensor, mask: Tensor, pictures: Sequence[Patches]) -> Tensor:
        """Return the head's outputs (B, 2), float32.

        Args:
            ids: (B, L) int64, padded on the right; each row holds the reward token once.
            mask: (B, L), 1 on what is not padding.
            pictures: B pictures.
        """
        outputs: Tensor = self.head(states_at(self.backbone, ids, mask, pictures, "image", self._reward_ids)[:, 0])
        return outputs


@dataclass(frozen=True)
class Hpsv3Weights:
    """Weights under the names of transformers 5's Qwen2VLModel, and the head's."""

    backbone: State
    head: State

    @property
    def vocabulary(self) -> int:
        """How many tokens have an embedding."""
        return self.backbone[EMBEDDING].shape[0]


def hpsv3_weights(state: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> Hpsv3Weights:
    """Rename the published tensors and drop what has no use; the backbone's become ``dtype``.

    Raises RewardError if the head or the embedding is missing. All other names and shapes are checked against the
    modules that they are loaded into.
    """
    named = modern_names(state)
    head = {name.removeprefix(HEAD): named.pop(name) for name in list(named) if name.startswith(HEAD)}
    if EMBEDDING not in named or not head:
        raise RewardError(f"'{where}' holds no '{EMBEDDING}' or no '{HEAD}*'; it is no HPSv3 checkpoint")
    return Hpsv3Weights({name: value.to(dtype) for name, value in named.items()}, head)


def load_head(width: int, state: State, where: str) -> nn.Module:
    """Return the head with exactly the weights ``state``, in float32. Raises RewardError if they do not fit."""
    with torch.device("meta"):
        head = empty_head(width)
    load_strictly(head, state, f"{where}', head '{HEAD}*")
    return head
