"""What rewards ask of a tokenizer: that it is whole, and that it reads a prompt as text."""

from __future__ import annotations

import json
from typing import Any

from branchtree.errors import RewardError
from branchtree.plugins.completeness import unmade_tokens

PROBES = ("a red cat", "two blue dogs")


def check_whole(tokenizer: Any, where: str) -> None:
    """Raise RewardError for a tokenizer of which a file is missing or cut short.

    Such a tokenizer loads all the same: it tells no texts apart, or cuts words where its model has never seen them cut.
    """
    try:
        first, second = (tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in PROBES)
    except Exception as error:  # the tokenizers library has exceptions of its own
        reason = " ".join(str(error).split())[:300]
        raise RewardError(f"the tokenizer of '{where}' does not work ({type(error).__name__}: {reason})") from error
    if first == second:
        raise RewardError(f"the tokenizer of '{where}' reads '{PROBES[0]}' and '{PROBES[1]}' alike; a file is missing")
    if _is_byte_pair(tokenizer) and (lost := unmade_tokens(tokenizer)):
        raise RewardError(
            f"the tokenizer of '{where}' has {len(lost)} entries that no merge makes; its merges.txt or "
            "tokenizer.json is cut short"
        )


def _is_byte_pair(tokenizer: Any) -> bool:
    """Whether a vocabulary is made by merges alone."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return bool(model.get("type") == "BPE" and not model.get("byte_fallback"))


def own_token(tokenizer: Any, prompt: str) -> str | None:
    """Say which of the tokenizer's own tokens the prompt spells out, if any: it would not be read as text.

    An unknown word also becomes a token of the tokenizer's own, and is none that the prompt spells out.
    """
    added = {index: token for token, index in tokenizer.get_added_vocab().items() if index is not None}
    settings = {"add_special_tokens": False, "split_special_tokens": tokenizer.split_special_tokens, "verbose": False}
    ids = tokenizer(prompt, **settings)["input_ids"]
    unknown = tokenizer.unk_token_id
    found = next((added[one] for one in ids if one in added and (one != unknown or added[one] in prompt)), None)
    return found and f"the prompt holds the special token {found}, which would not be read as text"
