"""The samples in files, as they lie there: nothing is resized or blended, and pictures are not turned.

Publishers' own scoring opens a picture and converts it to RGB, no more: an alpha channel is left out, and the EXIF
orientation is not followed. So it is here, that a file gets the number that its publisher gives it. Of a video all
frames that a player shows are read, turned as the file asks.
Axis letters: B samples, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchtree.data.images import read_image
from branchtree.data.videos import inspect_video, video_frames
from branchtree.errors import DataError, refuse
from branchtree.planning.gpus import GIB
from branchtree.plugins.samples import Media, Samples
from branchtree.plugins.saved import read_samples
from branchtree.studies.score.items import Item


@dataclass(frozen=True)
class Form:
    """What samples of one batch have in common."""

    kind: str
    shape: tuple[int, ...]  # (C, H, W), or (F, C, H, W); of a sample in a file of samples, how many numbers it has
    fps: float | None
    fields: str = ""  # of samples in a file: the shapes of their tensors, and the fields that hold for all

    @property
    def numbers(self) -> int:
        """How many a sample is made of."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """As one would say it: 640x480, or 81 frames of 640x480 at 16 fps."""
        if self.fields:
            return f"samples '{self.kind}' with {self.fields}"
        size = f"{self.shape[-1]}x{self.shape[-2]}"
        if self.kind == "image":
            return size
        return f"{self.shape[0]} frames of {size}" + (f" at {self.fps:.4g} fps" if self.fps else "")


class SavedSamples:
    """The samples in files. The file that was read last is kept, since a batch's samples mostly lie in one."""

    def __init__(self) -> None:
        self._last: tuple[Path, Samples] | None = None

    def __getitem__(self, path: Path) -> Samples:
        """Return the samples in a file. Raises DataError."""
        if self._last is None or self._last[0] != path:
            self._last = path, read_samples(path)[0]
        return self._last[1]

    def form(self, path: Path) -> Form:
        """Return what all samples in a file have in common."""
        samples = self[path]
        shapes = {name: list(value.shape[1:]) for name, value in samples.tensors.items()}
        shared = {name: str(value) for name, value in vars(samples).items() if not isinstance(value, Tensor | tuple)}
        numbers = sum(value[0].numel() for value in samples.tensors.values())
        return Form(samples.modality, (max(numbers, 1),), None, json.dumps({**shapes, **shared}))

    def take(self, items: Sequence[Item]) -> Samples:
        """Return the samples of some items, all of one form."""
        rows = [self[item.path][item.row : item.row + 1] for item in items if item.row is not None]
        return rows[0].concatenate(rows)


def find_forms(items: Sequence[Item], reasons: Sequence[str] = (), saved: SavedSamples | None = None) -> list[Form]:
    """Decode every file once to find its form.

    Raises DataError naming the files that cannot be scored, after the reasons against some that are known already.
    """
    found, refused, saved = [], list(reasons), saved or SavedSamples()
    for item in items:
        try:
            found.append(_form(item) if item.row is None else saved.form(item.path))
        except DataError as error:
            refused.append(str(error))
    refuse(refused)
    return found


def _form(item: Item) -> Form:
    if item.kind == "image":
        return Form("image", (3, *_image(item).shape[:2]), None)
    clip = inspect_video(item.path, item.at)
    form = Form("video", (clip.frames, 3, clip.height, clip.width), clip.fps)
    need, memory = 4 * form.numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        raise DataError(
            f"{item.at}video '{item.path}' has {form}, which take {need / GIB:.3g} GiB as numbers, more than the "
            f"{memory / GIB:.3g} GiB of memory here; cut it, or make it smaller"
        )
    return form


def read(items: Sequence[Item], like: Form, saved: SavedSamples | None = None) -> Samples:
    """Read samples of one form, images and videos as float32 on the CPU: bytes / 255.

    Beside these numbers one decoded frame or picture is in memory at a time. Raises DataError naming the file.
    """
    if like.fields:
        return (saved or SavedSamples()).take(items)
    pixels = torch.empty((len(items), *like.shape))
    for item, sample in zip(items, pixels, strict=True):
        frames = [_image(item)] if like.kind == "image" else video_frames(item.path, item.at)
        _fill(sample[None] if like.kind == "image" else sample, frames, item)
    pixels.div_(255)
    return Media(images=pixels) if like.kind == "image" else Media(videos=pixels, fps=like.fps)


def _image(item: Item) -> NDArray[np.uint8]:
    return np.array(read_image(item.path, item.at))


def _fill(sample: Tensor, frames: Iterable[NDArray[np.uint8]], item: Item) -> None:
    """Write decoded frames (H, W, C) into a sample (F, C, H, W)."""
    for frame, target in zip_longest(frames, sample.movedim(1, -1)):
        if frame is None or target is None or frame.shape != target.shape:
            raise DataError(f"{item.at}file '{item.path}' has changed since its scoring began; start again")
        target.copy_(torch.from_numpy(frame))
