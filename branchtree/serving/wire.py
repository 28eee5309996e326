"""The messages between a remote reward and its server.

Both directions are safetensors: tensors and short texts, which can be parsed safely from any sender. Numbers arrive to
the bit. Axis letters: B samples, F frames, C channels, H height, W width.

    request     pixels        float32 in [0, 1], or uint8 (255 is 1): images (B, C, H, W) or videos (B, F, C, H, W)
                samples.NAME  of samples of another kind, in place of pixels: each field that is a tensor
                file.N        uint8, the bytes of the N-th image or video that a condition names, if it can be read
                "request"     JSON in the metadata: modality, fps, the B conditions, the names of the files, and the
                              fields that are no tensors of samples of another kind
    response    values, valid, and, where the reward gives them, raw and details.NAME, each (B,)
                "reasons"     JSON in the metadata: why rows are not valid
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import DataError, RewardError
from branchtree.files.json_lines import parse_json
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.saved import make_samples
from branchtree.plugins.values import Condition

CONTENT_TYPE = "application/x-safetensors"
EXPECTS = "X-Branchtree-Expects"  # header: the identity of the reward that a client began with
DETAILS, FIELD = "details.", "samples."
FILES = ("image", "last_image", "video")  # fields of a condition that name files
MEBIBYTE = 2**20


class WireError(ValueError):
    """Bytes that are not a message of this format; the text says what is wrong."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("Input should be a valid string")
    return value


Text = Annotated[str, pydantic.PlainValidator(_text)]
"""Any text of Python, including half characters, which the reward itself refuses."""


class Info(pydantic.BaseModel, frozen=True):
    """The description of a server at ``/info``."""

    version: str  # of branchtree
    reward: str
    options: dict[str, Any]
    modalities: tuple[str, ...]
    groupwise: bool
    reads_prompt: bool = True
    fingerprint: str | None
    identity: str  # changes with whatever may change a score
    max_body: int  # bytes of a request


class _ConditionFields(pydantic.BaseModel, extra="forbid", frozen=True):
    """A condition; files are given by number."""

    prompt: Text
    negative_prompt: Text | None = None
    metadata: dict[Text, Any] = {}
    place: Text = ""
    image: int | None = None
    last_image: int | None = None
    video: int | None = None
    further_images: tuple[int, ...] = ()


class _Header(pydantic.BaseModel, extra="forbid", frozen=True):
    """The metadata of a request."""

    modality: Text
    fps: float | None = None
    conditions: tuple[_ConditionFields, ...]
    files: tuple[Text, ...] = ()  # their names on the client
    fields: dict[Text, Any] = {}  # of samples that are neither images nor videos


@dataclass(frozen=True)
class ScoreRequest:
    """B samples to score, and their conditions."""

    media: Samples
    conditions: tuple[Condition, ...]
    names: Mapping[Path, str]  # of the files on the client

    def in_words_of_client(self, reason: str) -> str:
        """Return a text with the client's names of the files."""
        for path, name in sorted(self.names.items(), key=lambda item: len(str(item[0])), reverse=True):
            reason = reason.replace(str(path), name)
        return reason


def encode_request(samples: Samples, conditions: Sequence[Condition]) -> bytes:
    """Return a request to score B samples under their conditions; pixels may be float32 or uint8.

    A file of a condition that cannot be read is left out, since not all rewards need it. Raises RewardError if the
    conditions' metadata, or fields of the samples, are not JSON.
    """
    numbers: dict[Path, int] = {}
    fields = []
    for condition in conditions:
        named: dict[str, Path] = {kind: path for kind in FILES if (path := getattr(condition, kind)) is not None}
        numbered: dict[str, Any] = {kind: numbers.setdefault(path, len(numbers)) for kind, path in named.items()}
        if condition.further_images:  # older servers take conditions without the key
            numbered["further_images"] = [numbers.setdefault(path, len(numbers)) for path in condition.further_images]
        fields.append(
            {
                "prompt": condition.prompt,
                "negative_prompt": condition.negative_prompt,
                "metadata": dict(condition.metadata),
                "place": condition.location,
                **numbered,
            }
        )
    header: dict[str, Any] = {
        "modality": samples.modality,
        "fps": samples.fps if isinstance(samples, Media) else None,
        "conditions": fields,
        "files": [str(path) for path in numbers],
    }
    if isinstance(samples, Media):
        tensors = {"pixels": samples.pixels}
    else:
        packed, header["fields"] = samples.pack()
        tensors = {f"{FIELD}{name}": value for name, value in packed.items()}
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        at = next((f"{one.location}: " for one in conditions if one.location and not _is_json(one.metadata)), "")
        raise RewardError(
            f"{at}the conditions' metadata cannot be sent to a remote reward: {error}; keep to JSON"
        ) from None
    return _save({**tensors, **_files(numbers)}, {"request": text})


def _is_json(metadata: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(metadata))
    except (TypeError, ValueError):
        return False
    return True


def _files(numbers: Mapping[Path, int]) -> dict[str, Tensor]:
    tensors = {}
    for path, number in numbers.items():
        try:
            content = bytearray(path.read_bytes())
        except (OSError, ValueError):  # ValueError: a NUL character in the name
            continue
        empty = torch.zeros(0, dtype=torch.uint8)
        tensors[f"file.{number}"] = torch.frombuffer(content, dtype=torch.uint8) if content else empty
    return tensors


def decode_request(body: bytes, folder: Path) -> ScoreRequest:
    """Read a request; the files of its conditions are written to ``folder``. Raises WireError."""
    tensors, metadata = _load(body)
    try:
        # The reward itself judges a prompt with half a character, as it does in the client's own process.
        text, location = metadata.get("request", ""), "the metadata 'request' is not right"
        header = _Header.model_validate(parse_json(text, location, half_characters=True))
    except DataError as error:
        raise WireError(str(error)) from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise WireError(f"the metadata 'request' is not right{f' at {at}' if at else ''}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise WireError(f"the metadata 'request' is not right: it is no JSON: {error}") from None
    paths = _write_files(header.files, tensors, folder)
    files = {f"file.{number}" for number in range(len(header.files))}
    sent = {name: value for name, value in tensors.items() if name not in files}
    samples = _media(sent, header) if header.modality in {"image", "video"} else _samples(sent, header)
    if len(samples) != len(header.conditions):
        raise WireError(f"{len(samples)} samples came with {len(header.conditions)} conditions; each needs its own")
    conditions = tuple(_condition(fields, paths) for fields in header.conditions)
    return ScoreRequest(samples, conditions, dict(zip(paths, header.files, strict=True)))


def _samples(tensors: Mapping[str, Tensor], header: _Header) -> Samples:
    """Return samples of a kind that a plug-in of the server registers. Raises WireError."""
    if not all(name.startswith(FIELD) for name in tensors):
        raise WireError(f"the tensors must be the samples' '{FIELD}NAME', and at most one 'file.N' for each file")
    fields = {name.removeprefix(FIELD): value for name, value in tensors.items()}
    try:
        return make_samples(header.modality, fields, header.fields)
    except DataError as error:
        raise WireError(str(error)) from None


def _media(tensors: Mapping[str, Tensor], header: _Header) -> Media:
    """Return images or videos, float32 in [0, 1]. Raises WireError."""
    pixels = tensors.get("pixels")
    if pixels is None or len(tensors) > 1:
        raise WireError("the tensors must be 'pixels' and at most one 'file.N' for each file")
    if pixels.dtype not in {torch.float32, torch.uint8}:
        raise WireError(f"pixels must be float32 or uint8, not {str(pixels.dtype).removeprefix('torch.')}")
    axes = "(B, C, H, W)" if header.modality == "image" else "(B, F, C, H, W)"
    if pixels.ndim != len(axes.split(",")) or pixels.numel() == 0:
        raise WireError(f"the pixels of {header.modality}s must be {axes}, not {tuple(pixels.shape)}")
    whole = pixels if pixels.dtype == torch.float32 else pixels.to(torch.float32) / 255
    return Media(images=whole) if header.modality == "image" else Media(videos=whole, fps=header.fps)


def _write_files(names: Sequence[str], tensors: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write the files that were sent, and return a path for each; a file that was not sent does not exist."""
    paths = []
    for number, name in enumerate(names):
        content = tensors.get(f"file.{number}")
        if content is not None and (content.dtype != torch.uint8 or content.ndim != 1):
            raise WireError(f"file {number} must come as a tensor 'file.{number}' of bytes")
        # The server makes the name: only a plain ending of what a client sends is used in a path.
        ending = re.search(r"\.[A-Za-z0-9]{1,8}\Z", name)
        path = folder / f"{number}{ending[0] if ending else ''}"
        if content is not None:
            path.write_bytes(content.numpy().tobytes())
        paths.append(path)
    return paths


def _condition(fields: _ConditionFields, paths: Sequence[Path]) -> Condition:
    named = {kind: number for kind in FILES if (number := getattr(fields, kind)) is not None}
    if any(not 0 <= number < len(paths) for number in (*named.values(), *fields.further_images)):
        raise WireError(f"a condition names a file that was not sent; {len(paths)} were")
    return Condition(
        prompt=fields.prompt,
        negative_prompt=fields.negative_prompt,
        metadata=fields.metadata,
        location=fields.place,
        further_images=tuple(paths[number] for number in fields.further_images),
        **{kind: paths[number] for kind, number in named.items()},
    )


def encode_scores(scores: Scores) -> bytes:
    """Return a response."""
    tensors = {"values": scores.values, "valid": scores.valid}
    if scores.raw is not None:
        tensors["raw"] = scores.raw
    tensors |= {DETAILS + name: detail for name, detail in scores.details.items()}
    return _save(tensors, {"reasons": json.dumps({str(row): reason for row, reason in scores.reasons.items()})})


def decode_scores(body: bytes, count: int) -> Scores:
    """Read a response to ``count`` samples. Raises WireError."""
    tensors, metadata = _load(body)
    if not {"values", "valid"} <= tensors.keys() or any(tensor.shape != (count,) for tensor in tensors.values()):
        raise WireError(f"an answer must hold 'values' and 'valid', and one number of each tensor for {count} samples")
    if tensors["valid"].dtype != torch.bool or not tensors["values"].is_floating_point():
        raise WireError("the answer's 'values' must be floats and its 'valid' flags")
    try:
        reasons = pydantic.TypeAdapter(dict[int, Text]).validate_python(json.loads(metadata.get("reasons", "{}")))
    except (ValueError, RecursionError):
        raise WireError("the answer's metadata 'reasons' must map rows to texts") from None
    return Scores(
        values=tensors["values"],
        valid=tensors["valid"],
        raw=tensors.get("raw"),
        details={name.removeprefix(DETAILS): tensor for name, tensor in tensors.items() if name.startswith(DETAILS)},
        reasons=reasons,
    )


def _save(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    # Copied: the format refuses tensors that share memory, as unscaled values and raw scores do.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    body: bytes = save(own, metadata)
    return body


def _load(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load

    try:
        tensors = load(body)
        length = int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8 : 8 + length]).get("__metadata__") or {}
    except Exception as error:  # the parser raises its own exception, and others for unknown types
        raise WireError(f"the body is not safetensors: {' '.join(str(error).split())[:200]}") from None
    return tensors, metadata
