"""VideoAlign's model: Qwen2-VL without its language head, and a linear one read at three tokens.

Axis letters: B videos, L tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from branchtree_rewards.videoalign.frames import Patches


class VideoAlignNetwork(nn.Module):
    """From tokens and patches to visual quality, motion quality and text alignment, as the publisher's `trainer.py`."""

    def __init__(self, backbone: Any, head: Tensor, reward_ids: tuple[int, ...]) -> None:
        """``head`` (1 or 3, D) is kept in float32; ``reward_ids`` are the tokens whose states it reads."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Parameter(head.float())
        self._reward_ids = reward_ids

    def forward(self, ids: Tensor, mask: Tensor, videos: Sequence[Patches]) -> Tensor:
        """Scores (B, 3) float32 before normalisation.

        Args:
            ids: (B, L) int64, padded on the right; each row holds each reward token once.
            mask: (B, L), 1 on what is not padding.
            videos: B videos.
        """
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=mask,
            # The publisher passes no positions, and transformers 4.45 then counts 0..L-1 on all three axes. Left to
            # itself, transformers 5 would compute M-RoPE, with which this checkpoint was not trained.
            position_ids=plain_positions(ids),
            pixel_values_videos=torch.cat([video.pixels for video in videos]),
            video_grid_thw=torch.tensor([video.grid for video in videos], device=ids.device),
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        places = [(ids == reward_id).int().argmax(dim=1) for reward_id in self._reward_ids]
        states = torch.stack([hidden[rows, place] for place in places], dim=1).float()  # (B, 3, D)
        outputs = states @ self.head.T
        # A head of three rows has one for each token; a head of one row serves all.
        return outputs.diagonal(dim1=1, dim2=2) if len(self.head) > 1 else outputs.squeeze(2)


def plain_positions(ids: Tensor) -> Tensor:
    """0..L-1 for time, height and width alike: (3, B, L)."""
    return torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
