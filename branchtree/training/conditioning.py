"""Encoded prompts: each is encoded once, and kept in memory and, where a run asks for it, on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch

from branchtree.core.padding import pad_together
from branchtree.core.transfer import send
from branchtree.errors import DataError
from branchtree.plugins.protocols import DropsEncoders, ModelAdapter
from branchtree.plugins.values import Condition, Conditioning
from branchtree.recipe.schema import RunSection
from branchtree.training.encodings import Encoding, EncodingStore, open_store
from branchtree.training.faults import require_finite_encoding

Key = tuple[object, ...]

CACHE_BYTES = 4 * 2**30
"""Host memory for encoded prompts: about a thousand of FLUX's in bfloat16."""

PREPARED = 128
"""Prompts that are encoded ahead in one call."""

IDLE_REQUESTS = 8
"""Requests in a row that need no encoding, after which encoders leave the host too."""


def open_cache(section: RunSection, model: ModelAdapter, device: torch.device) -> ConditioningCache:
    """The cache of a loaded model's encodings, on disk too where the ``run`` section asks for it."""
    store = open_store(section.embeddings, section.embeddings_gib, model, device)
    return ConditioningCache(model, CACHE_BYTES, store, device if section.encode_alone else None)


class ConditioningCache:
    """Encodes each prompt once and keeps the result on the CPU; the least recently used ones give way.

    ``store`` keeps them on disk too, for the runs to come. ``alone_on`` is the device that the denoiser leaves to the
    encoders while they work; without it the denoiser stays.
    """

    def __init__(
        self,
        model: ModelAdapter,
        limit: int = CACHE_BYTES,
        store: EncodingStore | None = None,
        alone_on: torch.device | None = None,
    ) -> None:
        self._model = model
        self._limit = limit
        self._store = store
        self._alone_on = alone_on
        self._idle = 0
        self._rows: OrderedDict[Key, Encoding] = OrderedDict()
        self._bytes = 0
        self._encoding = False  # whether encoders may be on the device

    def get(self, conditions: Sequence[Condition], device: torch.device) -> Conditioning:
        """The encoded conditions, P rows on the device. Encoders are released once nothing is missing."""
        keys = [_key(condition) for condition in conditions]
        missing = {key: condition for key, condition in zip(keys, conditions, strict=True) if key not in self._rows}
        try:
            self._add(self._found(missing))
        finally:
            self._release()
        rows = [self._rows[key] for key in keys]
        for key in keys:
            self._rows.move_to_end(key)
        self._shrink(keep=len(set(keys)))
        return {name: send(pad_together([row[name] for row in rows]), device) for name in rows[0]}

    def holds(self, conditions: Iterable[Condition]) -> bool:
        """Return whether all of these are encoded."""
        return all(_key(condition) in self._rows for condition in conditions)

    def prepare(self, conditions: Iterable[Condition], replace: bool = False) -> None:
        """Encode what will be asked for, in this order and as far as it fits, so that encoders come once for all of it.

        Under ``replace`` what is kept and not asked for gives way. An image or video that cannot be read ends it: the
        request that needs it will report it.
        """
        coming, asked = iter(conditions), set[Key]()
        try:
            while batch := {_key(condition): condition for condition in islice(coming, PREPARED)}:
                self._add(self._found({key: condition for key, condition in batch.items() if key not in self._rows}))
                asked |= batch.keys()
                for key in batch:
                    self._rows.move_to_end(key)
                if replace:
                    self._shrink(keep=len(asked))
                kept = len(asked) if replace else len(self._rows)
                if self._bytes / len(self._rows) * (kept + len(batch)) > self._limit:
                    return
        except DataError:
            return
        finally:
            self._release()

    def _make_room(self) -> None:
        """Have the denoiser leave the device to encoders that are to be alone there."""
        if self._encoding:
            return
        self._encoding = True
        if self._alone_on is not None:
            self._model.denoiser.to("cpu")
            if self._alone_on.type == "cuda":
                torch.cuda.empty_cache()  # the encoders' blocks are of other sizes

    def _release(self) -> None:
        """Have encoders that have worked leave the device, and the denoiser return that had left it to them."""
        if not self._encoding:
            return
        self._encoding = False
        self._model.release_frozen()
        if self._alone_on is not None:
            self._model.denoiser.to(self._alone_on)

    def _add(self, rows: Mapping[Key, Encoding]) -> None:
        for key, row in rows.items():
            self._rows[key] = row
            self._bytes += _size(row)

    def _found(self, missing: Mapping[Key, Condition]) -> dict[Key, Encoding]:
        """Encodings from the disk, and made where they are not there."""
        store = self._store
        found = {} if store is None else {key: store.read(condition) for key, condition in missing.items()}
        rows = {key: row for key, row in found.items() if row is not None}
        for key, row in rows.items():
            require_finite_encoding(self._model, missing[key], row)
        unknown = {key: condition for key, condition in missing.items() if key not in rows}
        self._rest(bool(unknown))
        if not unknown:
            return rows
        self._make_room()
        encoded = self._model.encode(list(unknown.values()))
        for i, (key, condition) in enumerate(unknown.items()):
            rows[key] = {name: value[i].clone() for name, value in encoded.items()}
            require_finite_encoding(self._model, condition, rows[key])
            if store is not None:
                store.write(condition, rows[key])
        return rows

    def _rest(self, encoding: bool) -> None:
        """Let encoders go that have had nothing to do for some time."""
        self._idle = 0 if encoding else self._idle + 1
        if self._idle == IDLE_REQUESTS and isinstance(self._model, DropsEncoders):
            self._model.drop_encoders()

    def _shrink(self, keep: int) -> None:
        while self._bytes > self._limit and len(self._rows) > keep:
            _, row = self._rows.popitem(last=False)
            self._bytes -= _size(row)


def _key(condition: Condition) -> Key:
    """All that an encoding may depend on."""
    return (condition.prompt, condition.negative_prompt, *condition.files, condition.metadata_text)


def _size(row: Encoding) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())
