"""The encoders of a pipeline: whether they tell two inputs apart, and what their work depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import ModelError
from branchtree.files.checksums import file_sha256
from branchtree_adapters.pipeline.sources import ModelSource, cached_commit
from branchtree_adapters.pipeline.tokenizers import check_tokenizer, probe_texts

PROBE_TOKENS = 64
HASHED_BYTES = 64 * 2**20
"""Files up to this size are distinguished by their contents, larger ones by path, size and time of change."""
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "pillow", "av", "ftfy")
"""Libraries that an encoding may depend on."""


@torch.no_grad()
def probe_encoders(pipeline: Any, location: str) -> None:
    """Encode two texts that differ, and two images, with each encoder that a pipeline has.

    Raises ModelError, naming the encoder's folder in ``location``, if it cannot tell them apart, or its tokenizer does
    not fit it.
    """
    from PIL import Image

    for name, encoder in pipeline.components.items():
        if encoder is None or not name.startswith(("text_encoder", "image_encoder")):
            continue
        texts = ""
        if name.startswith("text_encoder"):
            kind = name.replace("text_encoder", "tokenizer")
            tokenizer, folder = getattr(pipeline, kind, None), Path(location) / kind
            if tokenizer is None:
                continue
            check_tokenizer(tokenizer, folder, encoder.config.to_dict())
            probes = probe_texts(tokenizer, folder)
            length = min(getattr(tokenizer, "tokenizer", tokenizer).model_max_length, PROBE_TOKENS)
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            inputs = [tokenizer(text=text, **options).input_ids for text in probes]
            texts = f", as for the texts {list(probes)}"
        else:
            prepare = pipeline.components.get("image_processor") or pipeline.components["feature_extractor"]
            pictures = [Image.new("RGB", (64, 64), (red, 128, 128)) for red in (0, 255)]
            inputs = [prepare(picture, return_tensors="pt").pixel_values.to(encoder.dtype) for picture in pictures]
        outputs = [encoder(each.to(encoder.device)).values() for each in inputs]
        for first, second in zip(*outputs, strict=True):
            if isinstance(first, Tensor):
                _require_telling_apart(first, second, f"{location}/{name}", texts)


def _require_telling_apart(first: Tensor, second: Tensor, folder: str, texts: str) -> None:
    if not bool(torch.stack([first, second]).isfinite().all()):
        raise ModelError(
            f"the encoder in '{folder}' gives embeddings that are not finite; its weights are damaged, or the "
            "precision is too narrow for it: get the files again, or use a wider precision."
        )
    if torch.equal(first, second):
        raise ModelError(
            f"the encoder in '{folder}' gives one embedding for two inputs{texts}; it, or what prepares its inputs, is "
            "incomplete or damaged: get it again."
        )


def fingerprint(source: ModelSource, components: Sequence[str], settings: Mapping[str, object]) -> str | None:
    """Digest the files of ``components``, some settings, and the libraries' versions; None if no file is known.

    A hub id stands for its files by its commit in the local cache.
    """
    commit = cached_commit(source)
    if source.folder is None and commit is None:
        return None
    described = {
        "source": [source.name, commit] if source.folder is None else _files(source.folder, components),
        "settings": dict(settings),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _files(folder: Path, components: Sequence[str]) -> list[list[object]]:
    found = [file for name in components for file in sorted((folder / name).rglob("*")) if file.is_file()]
    return [[file.relative_to(folder).as_posix(), *_state(file, file.stat())] for file in found]


def _state(file: Path, status: os.stat_result) -> list[object]:
    small = status.st_size <= HASHED_BYTES
    return [file_sha256(file)] if small else [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _version(library: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(library)
    return None
