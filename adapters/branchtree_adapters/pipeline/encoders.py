"""The encoders of a pipeline: read from its files when they are first needed, and what tells their work apart."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from branchtree_adapters.pipeline import sources as shared

HASHED_BYTES = 64 * 2**20
"""Files up to this size are told apart by their contents, larger ones by place, size and time of change."""

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "pillow", "av", "ftfy")
"""Libraries that an encoding may depend on."""


@dataclass(frozen=True)
class EncoderSource:
    """Where the encoders of a pipeline are read from. ``pipeline`` is a diffusers class."""

    pipeline: Any
    source: shared.ModelSource
    dtype: torch.dtype
    others: Mapping[str, torch.dtype]  # of parts that are not in ``dtype``
    names: tuple[str, ...]

    @staticmethod
    def of(
        pipeline: Any,
        source: shared.ModelSource,
        dtype: torch.dtype,
        others: Mapping[str, torch.dtype],
        encoders: Iterable[str],
    ) -> EncoderSource:
        """The ``encoders`` that the pipeline's class takes."""
        places = inspect.signature(pipeline.__init__).parameters
        return EncoderSource(pipeline, source, dtype, others, tuple(name for name in encoders if name in places))

    def read(self, parts: Iterable[str]) -> dict[str, Any]:
        """The encoders by name, on the CPU; None where the model has none.

        ``parts`` are the names of all the pipeline's parts. Raises ModelError.
        """
        absent = [name for name in parts if name not in self.names]
        # The commit that the other parts are of, whatever the hub has by now.
        commit = _commit(self.source)
        source = self.source if commit is None else replace(self.source, revision=commit)
        found = shared.load_pipeline(self.pipeline, source, self.dtype, self.others, absent)
        return {name: getattr(found, name) for name in self.names}


def fingerprint(source: shared.ModelSource, parts: Sequence[str], settings: Mapping[str, object]) -> str | None:
    """A digest of the files of ``parts``, some settings, and the libraries' versions; None if no file is known.

    A hub id stands for its files by its commit in the local cache.
    """
    commit = _commit(source)
    if source.folder is None and commit is None:
        return None
    files = _files(source.folder, parts) if source.folder else None
    described = {
        "source": [source.name, commit] if files is None else files,
        "settings": dict(settings),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _commit(source: shared.ModelSource) -> str | None:
    """The commit of a hub id in the local cache; None for a folder, or where it is not there."""
    if source.folder is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.name, "model_index.json", revision=source.revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _files(folder: Path, parts: Sequence[str]) -> list[list[object]]:
    found = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
    return [[file.relative_to(folder).as_posix(), *_state(file)] for file in found]


def _state(file: Path) -> list[object]:
    status = file.stat()
    if status.st_size <= HASHED_BYTES:
        return [hashlib.sha256(file.read_bytes()).hexdigest()]
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
