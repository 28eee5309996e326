"""Questions about a picture or a video as token ids, in the chat format of Qwen2-VL.

A question holds reward tokens, at which the rewards read the model's states. Axis letters: B questions, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree_rewards.shared.source import WeightsSource, cause
from branchtree_rewards.shared.tokenizers import check_whole, own_token, too_long
from branchtree_rewards.shared.weights import quiet_libraries

SETTINGS = "tokenizer_config.json"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@dataclass(frozen=True)
class QuestionForm:
    """What a publisher asks of its model."""

    publisher: str  # whose model it is, in messages
    template: str  # the text after the picture or video, with ``{text_prompt}`` where the prompt goes
    pad: str  # the token that stands for a piece of the picture or video
    reward_tokens: tuple[str, ...]  # those in the template that scores are read at

    def conversation(self, prompt: str, pads: int) -> str:
        """Return the whole conversation: system line, picture, template with ``prompt``, and an answer's opening."""
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{self.pad * pads}<|vision_end|>"
            f"{self.template.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )


class Questions:
    """A checkpoint's tokenizer, checked against its model."""

    def __init__(self, form: QuestionForm, tokenizer: Any, architecture: Any) -> None:
        """Check the tokenizer against its model.

        Args:
            form: What is asked.
            tokenizer: A tokenizer of Qwen2-VL with the form's reward tokens.
            architecture: The model's Qwen2VLConfig.

        Raises:
            RewardError: they do not belong together.
        """
        text = architecture.text_config
        self._form, self._tokenizer, self._context = form, tokenizer, text.max_position_embeddings
        added = {token: index for token, index in tokenizer.get_added_vocab().items() if index is not None}
        if missing := [token for token in (*CHAT_TOKENS, form.pad, *form.reward_tokens) if token not in added]:
            raise RewardError(f"the tokenizer has no {', '.join(missing)}; it is not {form.publisher}'s")
        wanted = architecture.image_token_id if form.pad == IMAGE_PAD else architecture.video_token_id
        if added[form.pad] != wanted:
            raise RewardError(
                f"the tokenizer has {form.pad} at {added[form.pad]}, the model's config at {wanted}; give the 'base' "
                "that the checkpoint was trained from"
            )
        if len(tokenizer) > text.vocab_size:
            raise RewardError(
                f"the tokenizer has {len(tokenizer)} entries and the model {text.vocab_size} embeddings; they are not "
                "of one checkpoint"
            )
        self.reward_ids = tuple(added[token] for token in form.reward_tokens)

    def flaw(self, prompt: str) -> str | None:
        """Say why the model cannot be asked about a prompt, if it cannot be.

        A special token would add a picture, or another token to read a score at.
        """
        return own_token(self._tokenizer, prompt) or too_long(len(self.encode(prompt, 0)), self._context)

    def encode(self, prompt: str, pads: int) -> list[int]:
        """Return the token ids of the question about one picture or video, for which ``pads`` tokens stand."""
        text = self._form.conversation(prompt, pads)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def batch(self, rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Pad rows on the right: token ids (B, L) int64, and a mask (B, L) that is 1 on what is not padding."""
        longest = max(map(len, rows))
        pad = self._tokenizer.pad_token_id or 0  # masked, so any would do
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        return ids, mask


def open_tokenizer(source: WeightsSource | None, folder: str, base: WeightsSource, form: QuestionForm) -> Any:
    """Return a checkpoint's tokenizer, or its base model's with the form's reward tokens added.

    Args:
        source: The checkpoint; None if it never brings a tokenizer.
        folder: Where in the checkpoint the tokenizer would be: "" or a path that ends with a slash.
        base: The model that was fine-tuned.
        form: Whose reward tokens are added.

    Raises:
        RewardError: neither can be read.
    """
    from transformers import AutoTokenizer

    own = source is not None and source.maybe(f"{folder}{SETTINGS}") is not None
    holder, prefix = (source, folder) if source is not None and own else (base, "")
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
    if not own:
        tokenizer.add_special_tokens({"additional_special_tokens": list(form.reward_tokens)})
    return tokenizer
