"""Samples of any registered kind: made again of what they consist of, and kept in files.

A file is safetensors: the samples' tensors by name, and in its metadata, each as JSON, their ``modality`` (as it is),
their other ``fields``, and the ``conditions`` that they were made under.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from torch import Tensor

from branchtree.errors import DataError, PluginError, shortened
from branchtree.files.json_lines import parse_json
from branchtree.files.reading import failure_reason, require_file
from branchtree.files.writing import write_atomically
from branchtree.plugins.registry import registry
from branchtree.plugins.samples import Samples
from branchtree.plugins.values import Condition

CONDITIONS = TypeAdapter(tuple[Condition, ...])


def make_samples(modality: str, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> Samples:
    """Return samples of a registered kind from what their ``pack`` gave. Raises DataError for what makes none."""
    try:
        samples = registry().kind(modality).unpack(tensors, others)
        found = samples.modality
    except PluginError as error:
        raise DataError(str(error)) from None
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        listed = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'fields'}: {each['msg']}" for each in wrong)
        raise DataError(f"this makes no samples '{modality}': {shortened(listed)}") from None
    except Exception as error:  # a kind is a plug-in and can raise anything
        raise DataError(
            f"this makes no samples '{modality}': {shortened(f'{type(error).__name__}: {error}')}"
        ) from None
    if found != modality:
        raise DataError(f"these are samples '{found}', not '{modality}'")
    return samples


def write_samples(path: Path, samples: Samples, conditions: Sequence[Condition]) -> None:
    """Write samples and their conditions into one file."""
    from safetensors.torch import save

    tensors, others = samples.pack()
    nowhere = [replace(each, location="") for each in conditions]  # the file itself is where they are read from
    listed = to_jsonable_python(nowhere, fallback=str, bytes_mode="base64")
    metadata = {"modality": samples.modality, "fields": json.dumps(others), "conditions": json.dumps(listed)}
    # Copies, since safetensors refuses tensors that share their memory.
    write_atomically(path, save({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, metadata))


def read_samples(path: Path) -> tuple[Samples, tuple[Condition, ...]]:
    """Return the samples in a file, and their conditions; none where the file has none. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    require_file(path, DataError(f"there is no file '{shortened(str(path))}'"))
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if "modality" not in metadata:
                raise DataError(
                    f"file '{path}' holds no samples: its metadata have no 'modality'. A run writes files of samples "
                    "into the folder samples/ in its directory"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise DataError(f"file '{path}' is no whole safetensors file: {error}") from None
    except OSError as error:
        raise DataError(f"file '{path}' cannot be read: {failure_reason(error)}") from None
    others, listed = (
        parse_json(metadata.get(key, default), f"file '{path}': its metadata '{key}'")
        for key, default in (("fields", "{}"), ("conditions", "[]"))
    )
    try:
        samples = make_samples(metadata["modality"], tensors, others)
        conditions = CONDITIONS.validate_python(listed)
    except DataError as error:
        raise DataError(f"file '{path}': {error}") from None
    except ValidationError as error:
        raise DataError(f"file '{path}': its metadata 'conditions' are not right: {shortened(str(error))}") from None
    if conditions and len(conditions) != len(samples):
        raise DataError(
            f"file '{path}' has {len(samples)} samples and {len(conditions)} conditions; each needs its own"
        )
    return samples, conditions
