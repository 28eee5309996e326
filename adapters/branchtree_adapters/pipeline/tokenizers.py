"""Tokenizers of a pipeline: whole, no larger than their encoder's embedding, and able to tell two prompts apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchtree.errors import ModelError
from branchtree.plugins.completeness import unmade_tokens

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer_file"  # one file that stands for all the others
PROBED = 64
"""Tokens of a vocabulary, evenly spaced, among which two that a tokenizer distinguishes are looked for."""
REMEDY = "the tokenizer's folder is incomplete or damaged: get it again"


def check_tokenizer_files(kind: Any, folder: Path) -> None:
    """Refuse a folder without the files that a tokenizer's class reads; without some it would know no word.

    Raises ModelError.
    """
    names = dict(getattr(kind, "vocab_files_names", {}))
    whole = names.pop(WHOLE, None)
    needed = [CONFIG] if whole is None or (folder / whole).is_file() else [CONFIG, *names.values()]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        instead = f" (or {whole} for {' and '.join(names.values())})" if whole and missing != [CONFIG] else ""
        raise ModelError(f"'{folder}' lacks {', '.join(missing)}{instead}; {REMEDY}.")
    empty = [name for name in needed if (folder / name).stat().st_size == 0]
    if empty:
        raise ModelError(f"'{folder / empty[0]}' is empty; {REMEDY}.")


def check_tokenizer(tokenizer: Any, folder: Path, encoder: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that does not fit its encoder, whose configuration is ``encoder``. Raises ModelError."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    special = set(tokenizer.all_special_tokens)  # among them sentinels of pre-training, which no prompt holds
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if token not in special}
    rows = encoder.get("vocab_size")
    token, highest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if isinstance(rows, int) and highest >= rows:
        raise ModelError(
            f"the tokenizer in '{folder}' has the token {token!r} with the id {highest}, and its encoder's embedding "
            f"has {rows} rows (vocab_size); {REMEDY}, or give the encoder that belongs to it."
        )
    for role in ("pad_token", "eos_token"):
        if getattr(tokenizer, role) is None:
            raise ModelError(f"the tokenizer in '{folder}' has no {role}; {REMEDY}.")
        if isinstance(rows, int) and not 0 <= getattr(tokenizer, f"{role}_id") < rows:
            raise ModelError(f"the {role} of the tokenizer in '{folder}' is not in its encoder's embedding; {REMEDY}.")
    positions = encoder.get("max_position_embeddings")
    if isinstance(positions, int) and tokenizer.model_max_length > positions:
        raise ModelError(
            f"'{folder / CONFIG}' says model_max_length {tokenizer.model_max_length:.4g}, or nothing, and the encoder "
            f"has {positions} positions; set model_max_length to {positions}."
        )
    _require_reachable(tokenizer, folder)
    probe_texts(tokenizer, folder)


def _require_reachable(tokenizer: Any, folder: Path) -> None:
    """Refuse merges that do not lead to every token of the vocabulary, as a merges.txt that was cut off."""
    if "merges_file" not in getattr(tokenizer, "vocab_files_names", {}):
        return
    lost = unmade_tokens(tokenizer)
    if lost:
        raise ModelError(
            f"the merges of the tokenizer in '{folder}' never make {lost[0]!r} of its vocabulary; {REMEDY}."
        )


def probe_texts(tokenizer: Any, folder: Path) -> tuple[str, str]:
    """Return two texts of the tokenizer's own vocabulary that it encodes differently. Raises ModelError if none are."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    special = set(tokenizer.all_special_ids)
    plain = sorted(set(tokenizer.get_vocab().values()) - special)
    seen: dict[tuple[int, ...], str] = {}
    for token in plain[:: max(1, len(plain) // PROBED)]:
        text = tokenizer.decode([token]).strip()
        ids = tuple(number for number in tokenizer(text).input_ids if number not in special) if text else ()
        if ids:
            seen.setdefault(ids, text)
        if len(seen) == 2:
            first, second = seen.values()
            return first, second
    raise ModelError(
        f"the tokenizer in '{folder}' tells no two prompts apart: of {len(plain)} tokens beside special ones, none is "
        f"a text that it encodes; {REMEDY}."
    )
