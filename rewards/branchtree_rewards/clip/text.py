"""Prompts as token ids of CLIP's byte-pair vocabulary. Axis letters: B prompts, T tokens.

Two rules are published. OpenAI's first code, and open_clip after it, clean a prompt with ftfy and unescape its HTML
entities before splitting it; transformers' CLIPTokenizer does neither. Each reward says which one its publisher used.
They agree on plain prompts and differ on curly quotes, entities, full-width letters and ligatures.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import RewardError
from branchtree.files.checksums import verify_checksums
from branchtree.files.reading import user_path
from branchtree_rewards.shared.source import WeightsSource
from branchtree_rewards.shared.tokenizers import check_whole
from branchtree_rewards.shared.weights import quiet_libraries

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
BYTES = 256  # a byte-pair vocabulary has at least an entry for each
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # what open_clip splits a prompt into
LEGACY_END = 2  # with this end id, transformers pools at the highest token id


def load_clip_tokenizer(location: str, revision: str | None) -> Any:
    """The CLIP tokenizer of a folder or hub id.

    Raises RewardError if it cannot be loaded, or has no vocabulary: transformers makes one of two entries where the
    files are missing, or the hub cannot be reached.
    """
    from transformers import CLIPTokenizerFast

    try:
        with quiet_libraries():
            tokenizer = CLIPTokenizerFast.from_pretrained(location, revision=revision)
    except Exception as error:  # the tokenizers library has exceptions of its own
        raise _unreadable(location, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if len(tokenizer) <= BYTES:
        raise _unreadable(location, "it has no vocabulary")
    check_whole(tokenizer, location)
    return tokenizer


def _unreadable(location: str, reason: str) -> RewardError:
    return RewardError(
        f"cannot load a CLIP tokenizer from '{location}' ({reason}); give a hub id that can be reached, or a folder "
        f"with {' or '.join(TOKENIZER_FILES)} and merges.txt"
    )


def load_own_tokenizer(source: WeightsSource, named: str | None, default: str) -> Any:
    """The tokenizer that is ``named``, or else the one in a local checkpoint's folder, or else the ``default``.

    Raises RewardError.
    """
    folder = source.folder
    if named is not None:
        verify_checksums(user_path(named), RewardError)
        return load_clip_tokenizer(named, None)
    if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_clip_tokenizer(str(folder), None)
    return load_clip_tokenizer(default, source.revision if default == source.location else None)


def as_open_clip(tokenizer: Any) -> Any:
    """The tokenizer made to split `cleaned` prompts as open_clip does.

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


def check_end(tokenizer: Any, text_config: Any, where: str) -> None:
    """Refuse a tokenizer whose ids the text encoder does not have, or whose last token it does not read the text at.

    CLIP's text feature is read at the end token. Where transformers' CLIPModel finds none it takes the first token,
    whose feature is the same for every prompt. Raises RewardError.
    """
    end, vocabulary = tokenizer.eos_token_id, text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise RewardError(f"the tokenizer has {len(tokenizer)} entries and the model of '{where}' only {vocabulary}")
    read_at = len(tokenizer) - 1 if text_config.eos_token_id == LEGACY_END else text_config.eos_token_id
    if end != read_at:
        raise RewardError(
            f"the tokenizer ends prompts with id {end}, and the model of '{where}' reads texts at id {read_at}; give "
            "the tokenizer that belongs to the model"
        )


def token_ids(tokenizer: Any, prompts: Sequence[str], context: int) -> Tensor:
    """Prompts as ids (B, T), T the length of the text encoder's context; longer ones are cut before their end token.

    All rows have the full length, so that a prompt's row does not depend on the others. What pads them does not matter:
    a token sees only those before it.
    """
    whole = {"padding": "max_length", "truncation": True, "max_length": context}
    encoded = tokenizer(list(prompts), split_special_tokens=tokenizer.split_special_tokens, **whole)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def cleaned(prompt: str) -> str:
    """A prompt as OpenAI's first code and open_clip clean it.

    Mended, unescaped twice, with one space between words and in lower case.
    Source: `basic_clean` and `whitespace_clean` of the CLIP repository, with ftfy.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()
