"""What a model decodes and a reward scores: a batch of samples of some kind. Images and videos are one kind.

Axis letters: B samples, C channels, H height, W width, F frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from pydantic import ConfigDict, TypeAdapter
from pydantic_core import to_jsonable_python
from torch import Tensor

from branchtree.core.finite import finite_rows
from branchtree.plugins.values import Condition


@dataclass(frozen=True)
class Samples(ABC):
    """The base of kinds of samples. A kind is a frozen dataclass that says its ``modality``.

    Fields that are tensors have the samples as first axis, and tuples have one entry for each; what is in other fields
    holds for all samples. For the `remote` reward and for ``branchtree score`` a plug-in registers the kind
    (``register_samples``).
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @property
    @abstractmethod
    def modality(self) -> str:
        """The kind's name, by which rewards say what they score. A class attribute will do."""

    def show(self, conditions: Sequence[Condition]) -> Media | None:
        """Draw each sample under its condition, for grids and reports; None where there is nothing to look at."""
        return None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the fields that are tensors, and the others as JSON holds them, for files and for the wire.

        A kind with fields that do not come back from JSON as their annotations say overrides this and ``unpack``.
        """
        others = {name: value for name, value in vars(self).items() if name not in self.tensors}
        return self.tensors, to_jsonable_python(others, fallback=str, bytes_mode="base64")

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> Self:
        """Return the samples that ``pack`` took apart. Raises ValueError for fields that do not make any."""
        found: Self = TypeAdapter(cls).validate_python({**others, **tensors})
        lengths = {len(value) for value in vars(found).values() if isinstance(value, Tensor | tuple)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"its tensors and lists must be of equally many samples, not of {sorted(lengths)}")
        return found

    def __len__(self) -> int:
        return next(len(value) for value in vars(self).values() if isinstance(value, Tensor | tuple))

    def __getitem__(self, rows: slice) -> Self:
        return self._changed(lambda value: value[rows])

    def cpu(self) -> Self:
        """Return a copy on the CPU, which keeps nothing of a larger batch alive."""
        return self._changed(lambda value: value.cpu().clone() if isinstance(value, Tensor) else value)

    def is_finite(self) -> Tensor:
        """Return which samples hold neither NaN nor infinity, (B,) bool."""
        rows = [finite_rows(value).cpu() for value in self.tensors.values() if value.is_floating_point()]
        return torch.stack([torch.ones(len(self), dtype=torch.bool), *rows]).all(0)

    @classmethod
    def concatenate(cls, batches: Sequence[Self]) -> Self:
        """Concatenate samples of one kind and size."""
        first = batches[0]
        if len(batches) == 1:
            return first

        def together(name: str, value: Any) -> Any:
            values = [getattr(batch, name) for batch in batches]
            if isinstance(value, Tensor):
                return torch.cat(values)
            return sum(values[1:], value) if isinstance(value, tuple) else value

        return replace(first, **{field.name: together(field.name, getattr(first, field.name)) for field in fields(cls)})

    def _changed(self, change: Callable[[Any], Any]) -> Self:
        """Return samples with other values in the fields that have one for each sample."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: change(value) for n, value in found.items() if isinstance(value, Tensor | tuple)})


@dataclass(frozen=True)
class Media(Samples):
    """Either images or videos, float32 in [0, 1]."""

    images: Tensor | None = None  # (B, C, H, W)
    videos: Tensor | None = None  # (B, F, C, H, W)
    fps: float | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.videos is None):
            raise ValueError("Media holds either images or videos, and not both")

    @property
    def modality(self) -> str:
        """``"image"`` or ``"video"``."""
        return "video" if self.images is None else "image"

    @property
    def pixels(self) -> Tensor:
        """The images (B, C, H, W) or the videos (B, F, C, H, W)."""
        pixels = self.videos if self.images is None else self.images
        assert pixels is not None
        return pixels

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Return the media themselves."""
        return self
