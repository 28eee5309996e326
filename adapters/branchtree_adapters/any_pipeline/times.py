"""Times that are one number to a pipeline and one number per row to its model.

A pipeline's loop has one time for all rows, and expands it over the batch before it calls the model. A tree's batch
holds nodes of several depths. So the loop is given a tensor of B times that passes for a scalar: where the pipeline
would expand it, its rows are tiled instead, and where it would decide by it, rows that differ raise ``MixedRowsError``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}


class MixedRowsError(RuntimeError):
    """A pipeline asked a question of the time whose answer differs between rows."""

    def __init__(self, answer: Tensor) -> None:
        """``answer`` (B,) bool is what each row's time says."""
        super().__init__("the pipeline decides by the time, which differs between rows")
        self.answer = answer


class RowNumbers(Tensor):
    """Numbers of rows in the place of a scalar: it holds the tensor of them, which may be of any subclass itself.

    What is computed of it alone is of its kind again.
    """

    @classmethod
    def holding(cls, rows: Tensor) -> Self:
        """Return ``rows`` as this kind."""
        held = torch.empty(rows.shape, dtype=rows.dtype, device="meta").as_subclass(cls)
        held.__dict__["held"] = rows
        return held

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Ask the tensor that is held."""
        leaves = tree_leaves((args, kwargs))
        alone = all(isinstance(each, cls) or not each.ndim for each in leaves if isinstance(each, Tensor))
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        found = func(*plain_args, **plain_kwargs)
        return tree_map(lambda leaf: cls.holding(leaf) if isinstance(leaf, Tensor) else leaf, found) if alone else found

    def rows(self) -> Tensor:
        """Return the plain tensor."""
        return cast(Tensor, self.__dict__["held"])


def _plain(leaf: Any) -> Any:
    return leaf.rows() if isinstance(leaf, RowNumbers) else leaf


class RowTimes(RowNumbers):
    """B times (B,) in the place of a scalar.

    Raises TypeError where it meets a tensor of several numbers other than a vector of tokens' masks: that would
    broadcast, and mean something else.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Let a product with a mask of tokens become a time for each row and token."""
        if func in _PRODUCTS and len(args) == 2 and all(isinstance(each, Tensor) for each in args):
            rows, other = args if isinstance(args[0], cls) else args[::-1]
            if not isinstance(other, cls) and other.ndim:
                return (rows.rows().reshape(-1, *[1] * other.ndim) * other).flatten(1).as_subclass(TokenTimes)
        if any(isinstance(each, Tensor) and not isinstance(each, cls) and each.ndim for each in args):
            raise TypeError("a time for each row met a tensor of several numbers")
        return super().__torch_function__(func, types, args, kwargs)

    def expand(self, *size: Any) -> Tensor:  # type: ignore[override]
        """Tile the rows to the size, which is a multiple of B."""
        return self._tiled(Tensor.expand, size)

    def repeat(self, *size: Any) -> Tensor:
        """Tile the rows to the size, which is a multiple of B."""
        return self._tiled(Tensor.repeat, size)

    def _tiled(self, otherwise: Callable[..., Tensor], size: tuple[Any, ...]) -> Tensor:
        wanted = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        rows = self.rows()
        if len(wanted) == 1 and wanted[0] % len(rows) == 0:
            return rows.repeat(wanted[0] // len(rows))
        return otherwise(rows, *wanted)

    def unsqueeze(self, dim: int) -> Tensor:
        """Return itself where a scalar would become a vector of one."""
        return self if dim in (0, -1) else self.rows().unsqueeze(dim)

    def __bool__(self) -> bool:
        """Return what all rows say. Raises MixedRowsError where they differ."""
        answer = self.rows().bool()
        if bool(answer.all()) or not bool(answer.any()):
            return bool(answer.flatten()[0])
        raise MixedRowsError(answer)

    def item(self) -> Any:
        """Return the time of all rows. Raises TypeError where they differ."""
        rows = self.rows()
        if bool((rows == rows[0]).all()):
            return rows[0].item()
        raise TypeError("one number was asked of rows with several times")

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())


class TokenTimes(Tensor):
    """Times (B, tokens) in the place of a vector (tokens,) that the pipeline expands over rows."""

    def flatten(self, *dims: int) -> Tensor:
        """Return itself: a vector has one axis."""
        return self

    def unsqueeze(self, dim: int) -> Tensor:
        """Return itself: the rows are there."""
        return self

    def expand(self, *size: Any) -> Tensor:  # type: ignore[override]
        """Tile the rows to ``size[0]``, a multiple of B."""
        own = self.as_subclass(Tensor)
        return own.repeat(size[0] // len(own), 1)


class RowSigmas(RowNumbers):
    """A noise level for each row, (B, 1, ...), in the place of a scalar; as a float, which keys caches, their mean."""

    def __float__(self) -> float:
        return float(self.rows().mean())


def row_times(times: Tensor) -> Tensor:
    """Return times (B,) as a loop's only step, (1, B)."""
    return RowTimes.holding(times[None])


def row_sigmas(sigmas: Tensor, ndim: int) -> Tensor:
    """Return noise levels (B,) as a loop's two, (2, B, 1, ...), for states of ``ndim`` axes beside the batch."""
    level = sigmas.reshape(1, -1, *[1] * ndim)
    return RowSigmas.holding(torch.cat([level, level]))
