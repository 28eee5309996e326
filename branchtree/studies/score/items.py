"""From what a user names, files and folders and lists of them, to single samples with their prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from branchtree.data.prompts import require_characters
from branchtree.data.row_keys import warn_of_near_keys
from branchtree.errors import SHOWN_REASONS, DataError, refuse, shortened, shown
from branchtree.files.json_lines import json_object, numbered_lines, require_writable
from branchtree.files.reading import failure_reason, half_character, require_file, user_path
from branchtree.plugins.saved import read_samples
from branchtree.plugins.values import Condition

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})
KNOWN = ", ".join(sorted(IMAGES | VIDEOS))
REMEDIES = {
    **dict.fromkeys(
        (".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".exr", ".dng", ".cr2", ".nef", ".arw"),
        "convert this image to PNG, which keeps it as it is",
    ),
    **dict.fromkeys(
        (".wmv", ".flv", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".ogv", ".mxf"),
        "convert this video to MP4 with H.264 (ffmpeg -i IN OUT.mp4)",
    ),
}
"""Endings of pictures and videos that are not read, and what to do with them."""
BESIDE = frozenset({".txt", ".caption", ".md", ".json", ".jsonl", ".csv", ".parquet", ".yaml", ".html", ".npy", ".npz"})
"""Names of files that may lie beside pictures in a folder, and are passed over there."""
LIST, SAVED = ".jsonl", ".safetensors"
KEYS = ("image", "video", "samples", "prompt")
"""What is read of a row; its other keys are its metadata, and so is ``samples`` beside an image or a video."""
log = logging.getLogger("branchtree")
Given = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A sample that is to be scored: an image or video, which is a file, or one of those in a file of samples."""

    path: Path
    kind: str  # its modality
    condition: Condition
    row: int | None = None  # in a file of samples

    @property
    def name(self) -> str:
        """The file, and which of its samples."""
        return str(self.path) if self.row is None else f"{self.path}[{self.row}]"

    @property
    def at(self) -> str:
        """How messages about it begin: with the line that named it, if one did."""
        return f"{self.condition.location}: " if self.condition.location else ""


def list_items(given: Given | Sequence[Given], prompt: str | None) -> list[Item]:
    """Return the samples of files, folders, .jsonl lists, and rows such as the lists hold, in order.

    ``prompt`` is for whatever brings none of its own. Raises DataError, with file and line, for what is no list of
    samples; images and videos are not opened.
    """
    entries: Sequence[Given] = [given] if isinstance(given, str | Path | Mapping) else given
    if not isinstance(prompt, str | None):
        raise DataError(f"prompt: write a text, or leave it out; it is of type {type(prompt).__name__}")
    default = (prompt or "").strip()
    require_characters(default, "prompt")
    items: list[Item] = []
    refused: list[str] = []
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, Mapping):
            items.extend(_row_items(entry, Path(), f"item {number}", default))
        elif not isinstance(entry, str | Path) or not str(entry).strip():
            what = "an empty text" if isinstance(entry, str) else f"a value of type {type(entry).__name__}"
            raise DataError(f"file {number} is named by {what}; name an image, video, folder or .jsonl file")
        else:
            try:
                require_characters(str(entry), f"file {number}, {shown(str(entry))}: its name")
                items.extend(_path_items(user_path(entry), default))
            except DataError as error:
                refused.append(str(error))
    refuse(refused)
    if not items:
        raise DataError("there is nothing to score; give at least one image, video, folder or .jsonl file")
    rows = [(f"item {number}", entry) for number, entry in enumerate(entries, 1) if isinstance(entry, Mapping)]
    warn_of_near_keys(rows, KEYS, "prompt")
    for item in items:  # also of folders, whose files have the names that the disk gives them
        if half_character(str(item.path)):
            raise DataError(f"{item.at}file {shown(str(item.path))} has a name that is not UTF-8; rename it")
    return items


def _path_items(path: Path, prompt: str) -> Iterator[Item]:
    if os.path.isdir(path):
        yield from (Item(file, _kind(file), Condition(prompt)) for file in _inside(path))
    elif path.suffix.lower() == LIST:
        yield from _listed(path, prompt)
    elif kind := _kind(path):
        yield Item(path, kind, Condition(prompt))
    elif path.suffix.lower() == SAVED:
        yield from _saved(path, prompt)
    else:
        require_file(path, DataError(f"there is no file '{shortened(str(path))}'"))
        refuse(_unread([path]))
        raise DataError(
            f"file '{path}' is neither an image nor a video by its name; known are {KNOWN}, {LIST}, and {SAVED} for "
            "samples of other kinds"
        )


def _inside(folder: Path) -> list[Path]:
    """List the pictures and videos of a folder by name; what else lies there is passed over with a warning.

    Hidden files and those of ``BESIDE`` go without one. Raises DataError for a folder that has pictures or videos of
    kinds that are not read, or none at all.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"folder '{folder}' cannot be read: {failure_reason(error)}") from None
    refuse(_unread(entries))
    inside, other = [], []
    for path in entries:
        if _kind(path) and os.path.isfile(path):
            inside.append(path)
        elif path.suffix.lower() not in BESIDE:
            other.append(path)
    if not inside:
        saved = [path.name for path in other if path.suffix.lower() == SAVED]
        hint = f"; name its files of samples one by one, as in '{folder / saved[0]}'" if saved else ""
        raise DataError(f"folder '{folder}' holds no images or videos ({KNOWN}){hint}")
    if other:
        more = f" and {len(other) - SHOWN_REASONS} more" if len(other) > SHOWN_REASONS else ""
        names = ", ".join(f"'{path.name}'" for path in other[:SHOWN_REASONS])
        log.warning("folder '%s': not scored, as no image or video by name: %s%s", folder, names, more)
    return inside


def _unread(paths: Sequence[Path]) -> list[str]:
    """Say of each picture or video that is not read what to do with it."""
    endings = ((path, path.suffix.lower()) for path in paths)
    return [
        f"file '{path}': {ending} is not read; {REMEDIES[ending]}" for path, ending in endings if ending in REMEDIES
    ]


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGES else "video" if suffix in VIDEOS else ""


def _listed(path: Path, prompt: str) -> Iterator[Item]:
    require_file(path, DataError(f"there is no file '{shortened(str(path))}'"))
    numbered = numbered_lines(path)
    if not numbered:
        raise DataError(f'{path}: is empty; write lines such as {{"image": "a.png", "prompt": "a cat"}}')
    rows = [(location, json_object(line, location)) for location, line in numbered]
    for location, row in rows:
        yield from _row_items(row, path.parent, location, prompt)
    warn_of_near_keys(rows, KEYS, "prompt")


def _saved(path: Path, prompt: str) -> Iterator[Item]:
    """Yield the samples in a file, under the conditions that it has of them; ``prompt`` is for those without one."""
    samples, conditions = read_samples(path)
    for row in range(len(samples)):
        condition = conditions[row] if conditions else Condition("")
        known = condition if condition.prompt.strip() else replace(condition, prompt=prompt)
        yield Item(path, samples.modality, known, row)


def _row_items(row: Mapping[str, Any], folder: Path, location: str, default: str) -> list[Item]:
    key = _file_key(row, location)
    file, prompt = row[key], row.get("prompt")
    if not isinstance(file, str | Path) or not str(file).strip():
        raise DataError(f"{location}: {key}: write the path of a file as a text")
    if not isinstance(prompt, str | None):
        raise DataError(f"{location}: prompt: write a text, or leave it out")
    text = default if prompt is None else prompt.strip()
    require_characters(text, f"{location}: prompt")
    require_characters(str(file), f"{location}: {key}")
    metadata = {name: value for name, value in row.items() if name not in {"image", "video", "prompt", key}}
    require_writable(metadata, location)
    path = folder / user_path(file)
    if key != "samples":
        return [Item(path, key, Condition(text, metadata=metadata, location=location))]
    given: dict[str, Any] = {"location": location, "prompt": prompt and text, "metadata": metadata}
    changes = {name: value for name, value in given.items() if value}  # what the row leaves out is the file's own
    try:
        return [replace(item, condition=replace(item.condition, **changes)) for item in _saved(path, default)]
    except DataError as error:
        raise DataError(f"{location}: {error}") from None


def _file_key(row: Mapping[str, Any], location: str) -> str:
    """Return the key under which a row names its file. Raises DataError unless there is exactly one."""
    keys = [key for key in ("image", "video") if row.get(key) is not None]
    if not keys and row.get("samples") is not None:
        keys = ["samples"]
    if len(keys) == 1:
        return keys[0]
    has = "both" if keys else f"none; it has {shortened(', '.join(map(str, row))) or 'nothing'}"
    raise DataError(f"{location}: needs a file under one of 'image', 'video' and 'samples', but has {has}")
