"""The question that VideoAlign puts to its model about a video, as token ids.

The template is the publisher's `detailed_special` (KwaiVGI/VideoAlign, `prompt_template.py`, MIT licence), byte for
byte: blanks at the ends of its lines count. Around it stands the chat format of Qwen2-VL.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree_rewards.shared.source import WeightsSource, cause
from branchtree_rewards.shared.tokenizers import check_whole, own_token, too_long
from branchtree_rewards.shared.weights import quiet_libraries
from branchtree_rewards.videoalign.settings import DIMENSIONS

TEMPLATE = "videoalign_detailed_special.txt"
SETTINGS = "tokenizer_config.json"
VIDEO_PAD = "<|video_pad|>"
REWARD_TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)  # the scores are read at these


def template() -> str:
    """Return the publisher's text, with ``{text_prompt}`` where the prompt goes."""
    return (resources.files("branchtree_rewards") / "data" / TEMPLATE).read_bytes().decode("utf-8")


def conversation_text(prompt: str, video_tokens: int) -> str:
    """Return the whole conversation: system line, video, template with ``prompt``, and the opening of an answer."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{VIDEO_PAD * video_tokens}<|vision_end|>"
        f"{template().replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )


class Questions:
    """A checkpoint's tokenizer, checked against its model."""

    def __init__(self, tokenizer: Any, vocabulary: int, video_token_id: int, context: int) -> None:
        """Check the tokenizer against its model.

        Args:
            tokenizer: A tokenizer of Qwen2-VL with VideoAlign's reward tokens.
            vocabulary: How many embeddings the model has.
            video_token_id: The id that stands for a video in the model's configuration.
            context: How many tokens the model reads at most.

        Raises:
            RewardError: they do not belong together.
        """
        self._tokenizer, self._context = tokenizer, context
        added = {token: index for token, index in tokenizer.get_added_vocab().items() if index is not None}
        wanted = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", VIDEO_PAD, *REWARD_TOKENS)
        if missing := [token for token in wanted if token not in added]:
            raise RewardError(f"the tokenizer has no {', '.join(missing)}; it is not VideoAlign's")
        if added[VIDEO_PAD] != video_token_id:
            raise RewardError(
                f"the tokenizer has {VIDEO_PAD} at {added[VIDEO_PAD]}, the model's config at {video_token_id}; give "
                "the 'base' that the checkpoint was trained from"
            )
        if len(tokenizer) > vocabulary:
            raise RewardError(
                f"the tokenizer has {len(tokenizer)} entries and the model {vocabulary} embeddings; they are not of "
                "one checkpoint"
            )
        self.reward_ids = tuple(added[token] for token in REWARD_TOKENS)

    def flaw(self, prompt: str) -> str | None:
        """Say why the model cannot be asked about a prompt, if it cannot be.

        A special token would add a video, or another token to read a score at.
        """
        return own_token(self._tokenizer, prompt) or too_long(len(self.encode(prompt, 0)), self._context)

    def encode(self, prompt: str, video_tokens: int) -> list[int]:
        """Return the token ids of the question about one video."""
        ids: list[int] = self._tokenizer(conversation_text(prompt, video_tokens), add_special_tokens=False)["input_ids"]
        return ids

    def batch(self, rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pad rows on the right: token ids (B, L) int64, and a mask (B, L) that is 1 on what is not padding."""
        longest = max(map(len, rows))
        pad = self._tokenizer.pad_token_id or 0  # masked, so any would do
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        return ids, mask


def open_tokenizer(source: WeightsSource, folder: str, base: WeightsSource) -> Any:
    """Return the tokenizer in ``folder`` of the checkpoint, or the base model's with the reward tokens added.

    Raises RewardError if neither can be read.
    """
    from transformers import AutoTokenizer

    holder, prefix = (source, f"{folder}/") if source.maybe(f"{folder}/{SETTINGS}") else (base, "")
    # Always from a folder: in a subfolder of a hub repository, transformers would look for a model's config.json.
    settings = holder.find(f"{prefix}{SETTINGS}")
    if holder.maybe(f"{prefix}tokenizer.json") is None:
        for name in ("vocab.json", "merges.txt"):
            holder.find(f"{prefix}{name}")
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(str(settings.parent))
    except Exception as error:  # tokenizers and transformers have exceptions of their own for a file that is not right
        raise RewardError(f"cannot read the tokenizer of '{holder.name}' ({cause(error)})") from error
    check_whole(tokenizer, holder.name)
    if holder is base:
        tokenizer.add_special_tokens({"additional_special_tokens": list(REWARD_TOKENS)})
    return tokenizer
