"""Whether what a library loaded is complete: signs by which adapters and rewards find what it filled in or left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


def unexpected_keys(model: nn.Module, info: Mapping[str, Iterable[Any]]) -> list[str]:
    """Return the tensors of a file that ``model`` has no use for, in order.

    Buffers that a model computes are not among them: files of older versions hold them too. ``info`` is what
    ``from_pretrained`` of transformers or diffusers returns under ``output_loading_info``.
    """
    state = model.state_dict()
    computed = tuple(name for name, _ in model.named_buffers() if name not in state)
    return sorted(key for key in map(str, info["unexpected_keys"]) if not key.endswith(computed))


def unmade_tokens(tokenizer: Any) -> list[str]:
    """Return the entries of a fast byte-pair tokenizer's vocabulary that no merge makes, special tokens apart.

    There are some where a merges.txt or tokenizer.json was cut short.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    known = {"".join(pair) for pair in pairs} | tokenizer.get_added_vocab().keys() | {*tokenizer.all_special_tokens}
    suffix = model.get("end_of_word_suffix") or ""
    return [token for token in model["vocab"] if token not in known and len(token.removesuffix(suffix)) > 1]
