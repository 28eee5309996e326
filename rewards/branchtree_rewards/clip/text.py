"""Prompts as token ids of CLIP's byte-pair vocabulary. Axis letters: B prompts, T tokens.

Two rules are published. OpenAI's first code, and open_clip after it, clean a prompt with ftfy and unescape its HTML
entities before splitting it; transformers' CLIPTokenizer does neither. Each reward says which one its publisher used.
They agree on plain prompts and differ on curly quotes, entities, full-width letters and ligatures.
"""

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree_rewards.shared.tokenizers import TokenizerKind

BYTES = 256  # a byte-pair vocabulary has at least an entry for each
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # what open_clip splits a prompt into
LEGACY_END = 2  # with this end id, transformers pools at the highest token id
OPEN_CLIP_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # a hub id with open_clip's vocabulary

CLIP_TOKENIZER = TokenizerKind(
    name="CLIP",
    class_name="CLIPTokenizerFast",
    files=("tokenizer.json", "vocab.json"),
    wanted="tokenizer.json or vocab.json and merges.txt",
    flaw=lambda tokenizer: "it has no vocabulary" if len(tokenizer) <= BYTES else None,
)


def as_open_clip(tokenizer: Any) -> Any:
    """Make the tokenizer split `cleaned` prompts as open_clip does, and return it.

    The vocabulary is the same. transformers would compose accents, and would read "<|endoftext|>" in a prompt as the
    end token, at which the rest of the prompt is lost.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.split_special_tokens = True
    return tokenizer


def check_end(tokenizer: Any, text_config: Any, where: str, *, highest: bool = False) -> None:
    """Refuse a tokenizer whose ids the text encoder does not have, or whose last token it does not read the text at.

    CLIP's text feature is read at the end token. Where transformers' CLIPModel finds none it takes the first token,
    whose feature is the same for every prompt. An encoder that reads at the ``highest`` id whatever its configuration
    says, as OWLv2's does, needs an end token with that id. Raises RewardError.
    """
    end, vocabulary = tokenizer.eos_token_id, text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise RewardError(f"the tokenizer has {len(tokenizer)} entries and the model of '{where}' only {vocabulary}")
    legacy = highest or text_config.eos_token_id == LEGACY_END
    read_at = len(tokenizer) - 1 if legacy else text_config.eos_token_id
    if end != read_at:
        raise RewardError(
            f"the tokenizer ends prompts with id {end}, and the model of '{where}' reads texts at id {read_at}; give "
            "the tokenizer that belongs to the model"
        )


def token_ids(tokenizer: Any, prompts: Sequence[str], context: int) -> Tensor:
    """Return prompts as ids (B, T), T the ``context`` of the text encoder; longer ones are cut before their end token.

    All rows have the full length, so that a prompt's row does not depend on the others. What pads them does not matter:
    a token sees only those before it.
    """
    whole = {"padding": "max_length", "truncation": True, "max_length": context}
    encoded = tokenizer(list(prompts), split_special_tokens=tokenizer.split_special_tokens, **whole)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def cleaned(prompt: str) -> str:
    """Return a prompt as OpenAI's first code and open_clip clean it.

    It is repaired by ftfy, unescaped twice, with one space between words and in lower case, as by `basic_clean` and
    `whitespace_clean` of the CLIP repository.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()
