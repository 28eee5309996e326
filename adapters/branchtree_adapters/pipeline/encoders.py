"""The encoders of a pipeline: whether they tell two inputs apart, and what their work depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import ModelError
from branchtree_adapters.pipeline.sources import ModelSource, cached_commit
from branchtree_adapters.pipeline.tokenizers import check_tokenizer, probe_texts

HASHED_BYTES = 64 * 2**20
"""Files up to this size are told apart by their contents, larger ones by path, size and time of change."""
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
        folder, given = f"{location}/{name}", {"device": getattr(encoder, "device", None)}
        tokenizer = pipeline.components.get(name.replace("text_encoder", "tokenizer"))
        if encoder is None:
            continue
        if name.startswith("text_encoder") and tokenizer is not None:
            files = Path(f"{location}/{name.replace('text_encoder', 'tokenizer')}")
            check_tokenizer(tokenizer, files, encoder.config.to_dict())
            texts = probe_texts(tokenizer, files)
            length = min(tokenizer.model_max_length, PROBE_TOKENS)
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            pairs = [_tensors(encoder(tokenizer(text, **options).input_ids.to(**given))) for text in texts]
            _require_telling_apart(pairs, folder, f", as for the texts {list(texts)}")
        elif name == "image_encoder":
            prepare = pipeline.components.get("image_processor") or pipeline.components["feature_extractor"]
            pixels = [prepare(Image.new("RGB", (64, 64), (shade, 128, 128)), return_tensors="pt") for shade in (0, 255)]
            pairs = [_tensors(encoder(each.pixel_values.to(**given, dtype=encoder.dtype))) for each in pixels]
            _require_telling_apart(pairs, folder, "")


PROBE_TOKENS = 64


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]


def _require_telling_apart(pairs: Sequence[Sequence[Tensor]], folder: str, texts: str) -> None:
    for first, second in zip(*pairs, strict=True):
        if not bool(torch.stack([first, second]).isfinite().all()):
            raise ModelError(
                f"the encoder in '{folder}' gives embeddings that are not finite; its weights are damaged, or the "
                "precision is too narrow for it: get the files again, or use a wider precision."
            )
        if torch.equal(first, second):
            raise ModelError(
                f"the encoder in '{folder}' gives one embedding for two inputs{texts}; it, or what prepares its "
                "inputs, is incomplete or damaged: get it again."
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
