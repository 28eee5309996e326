"""Tokenizers of rewards: the choice of one, and checks that it is whole and reads a prompt as text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from branchtree.errors import RewardError
from branchtree.files.checksums import verify_checksums
from branchtree.files.reading import user_path
from branchtree.plugins.completeness import unmade_tokens
from branchtree_rewards.shared.source import WeightsSource, cause
from branchtree_rewards.shared.weights import quiet_libraries

PROBES = ("a red cat", "two blue dogs")


@dataclass(frozen=True)
class TokenizerKind:
    """The tokenizers of one architecture."""

    name: str  # in messages
    class_name: str  # in transformers
    files: tuple[str, ...]  # a folder with one of them holds a tokenizer
    wanted: str  # what a folder must hold, as a message says it
    flaw: Callable[[Any], str | None]  # says why one that was loaded is of no use

    def load(self, location: str, revision: str | None = None) -> Any:
        """Return the tokenizer of a folder or hub id.

        Raises RewardError if it cannot be loaded, is cut short, or has no vocabulary: transformers makes one of the
        special tokens alone where files are missing, or the hub cannot be reached.
        """
        import transformers

        try:
            with quiet_libraries():
                tokenizer = getattr(transformers, self.class_name).from_pretrained(location, revision=revision)
        except Exception as error:  # the tokenizers library has exceptions of its own
            raise self._unreadable(location, cause(error)) from error
        if reason := self.flaw(tokenizer):
            raise self._unreadable(location, reason)
        check_whole(tokenizer, location)
        return tokenizer

    def choose(self, source: WeightsSource, named: str | None, default: str) -> Any:
        """Return the tokenizer that is ``named``, else that of a local checkpoint's folder, else the ``default``.

        Raises RewardError as `load` does, and for a named folder whose files differ from its SHA256SUMS.
        """
        if named is not None:
            verify_checksums(user_path(named), RewardError)
            return self.load(named)
        if source.folder is not None and source.maybe(*self.files):
            return self.load(str(source.folder))
        return self.load(default, source.revision if default == source.location else None)

    def _unreadable(self, location: str, reason: str) -> RewardError:
        return RewardError(
            f"cannot load a {self.name} tokenizer from '{location}' ({reason}); give a hub id that can be reached, or "
            f"a folder with {self.wanted}"
        )


def check_whole(tokenizer: Any, where: str) -> None:
    """Raise RewardError for a tokenizer of which a file is missing or cut short.

    Such a tokenizer loads all the same: it tells no texts apart, or cuts words where its model has never seen them cut.
    """
    try:
        first, second = (tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in PROBES)
    except Exception as error:  # the tokenizers library has exceptions of its own
        raise RewardError(f"the tokenizer of '{where}' does not work ({cause(error)})") from error
    if first == second:
        raise RewardError(f"the tokenizer of '{where}' reads '{PROBES[0]}' and '{PROBES[1]}' alike; a file is missing")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made_by_merges = model.get("type") == "BPE" and not model.get("byte_fallback")
    if made_by_merges and (lost := unmade_tokens(tokenizer)):
        raise RewardError(
            f"the tokenizer of '{where}' has {len(lost)} entries that no merge makes; its merges.txt or "
            "tokenizer.json is cut short"
        )


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


def too_long(tokens: int, context: int) -> str | None:
    """Return the problem with a question of more ``tokens`` than the ``context`` that a model reads, or None."""
    if tokens <= context:
        return None
    return f"the prompt is too long: with the question it has {tokens} tokens, and the model reads {context}"
